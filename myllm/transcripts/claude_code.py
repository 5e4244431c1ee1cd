"""Claude Code's transcripts (`~/.claude/projects/*/*.jsonl`): one JSON object a line, one conversation a
file.

There is no published description; this follows files and parsers in public, such as
github.com/simonw/claude-code-transcripts. Every line with a `uuid` has its place in the tree by `parentUuid`,
also those that hold no message. One answer of the API comes in several lines, a block each, with the same
`message.id`; the results of its tool calls hang from the line of their call.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from myllm.errors import BadDataError
from myllm.transcripts.json_lines import Line, objects
from myllm.transcripts.transcript import Notes, Transcript, moment
from myllm.transcripts.tree import About, Draft, Node, assemble

SOURCE: Final = "claude-code"
TITLES: Final = {"custom-title": "customTitle", "ai-title": "aiTitle", "summary": "summary"}
"""Lines that name the conversation and where, the best first."""
FINISH: Final = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
}


def parse(lines: Iterable[Line], notes: Notes, now: float) -> Iterator[Transcript]:
    """The conversation of a file; what has no date is of `now`. Raises BadDataError."""
    reader = _Reader(notes, now)
    for line in objects(lines, notes):
        reader.take(line)
    if reader.nodes:
        yield reader.transcript()


class _Reader:
    """The lines of a file so far."""

    def __init__(self, notes: Notes, now: float) -> None:
        self.nodes: dict[str, Node] = {}
        self._notes = notes
        self._about = About(source=SOURCE, id="", created=now)
        self._titles: dict[str, str] = {}
        self._answers: dict[str, str] = {}  # the first line of each answer, by `message.id`
        self._answer_of: dict[str, str] = {}  # that of each line of an answer
        self._results: dict[str, str] = {}  # the last line of results for each answer
        self._head: str | None = None

    def transcript(self) -> Transcript:
        self._about.title = next((self._titles[kind] for kind in TITLES if kind in self._titles), "")
        return assemble(self._about, self.nodes, self._head)

    def take(self, line: Mapping[str, Any]) -> None:
        """The next line."""
        kind, key = str(line.get("type")), line.get("uuid")
        self._learn(line)
        if kind in TITLES and isinstance(title := line.get(TITLES[kind]), str):
            self._titles[kind] = title
        elif not isinstance(key, str):
            self._notes.add(f"line of type {kind:.40}")
        elif key in self.nodes:
            self._notes.add("line that repeats one before")
        else:
            self._place(key, line)

    def _learn(self, line: Mapping[str, Any]) -> None:
        """What any line may say of the conversation."""
        about = self._about
        if not about.id and isinstance(id_ := line.get("sessionId"), str):
            about.id = id_
        if about.directory is None:
            about.directory = line.get("cwd")
        if not self.nodes and (created := moment(line.get("timestamp"))) is not None:
            about.created = created

    def _place(self, key: str, line: Mapping[str, Any]) -> None:
        # After a compaction the conversation begins anew; where it really went on is the logical parent.
        parent = line.get("parentUuid") or line.get("logicalParentUuid")
        parent = parent if isinstance(parent, str) else None
        drafts = self._drafts(line)
        message = line.get("message")
        if drafts and drafts[0].role == "assistant" and isinstance(message, dict):
            first = self._answers.setdefault(str(message.get("id") or key), key)
            self._answer_of[key] = first
            if first != key:
                self.nodes[first].drafts[0].take(drafts[0])
                parent, drafts = first, []
        elif drafts and all(draft.role == "tool" for draft in drafts):
            answer = self._answer_of.get(parent or "", parent or "")
            parent = self._results.get(answer, parent)
            self._results[answer] = key
        self.nodes[key] = Node(parent, drafts)
        if line.get("isSidechain") and drafts:
            self._notes.add("message of a sub-agent, kept as a branch of its own")
        if not line.get("isSidechain") and line.get("type") in ("user", "assistant"):
            self._head = key

    def _drafts(self, line: Mapping[str, Any]) -> list[Draft]:
        message = line.get("message")
        if line.get("type") not in ("user", "assistant") or not isinstance(message, dict):
            self._notes.add(f"line of type {line.get('type')!s:.40}")
            return []
        if "toolUseResult" in line:
            self._notes.add("detail of a tool's result beside its text")
        created = moment(line.get("timestamp"))
        draft = Draft(role=line["type"], created=self._about.created if created is None else created)
        if draft.role == "assistant":
            draft.answer = _answer(message)
        content = message.get("content")
        blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
        results = [result for block in blocks if (result := self._block(draft, block))]
        return [*results, draft] if draft else results

    def _block(self, draft: Draft, block: Any) -> Draft | None:
        """Adds a block to its message; a tool's result is a message of its own."""
        match block:
            case {"type": "text", "text": str(text)}:
                draft.content.append(text)
            case {"type": "thinking", "thinking": str(text)}:
                draft.reasoning.append(text)
            case {"type": "tool_use", "id": id_, "name": name, "input": arguments}:
                self._call(draft, id_, name, arguments)
            case {"type": "tool_result", "tool_use_id": str(id_)}:
                if block.get("is_error"):
                    self._notes.add("mark of a tool's result as an error")
                text = self._result(block.get("content"))
                return Draft(role="tool", created=draft.created, content=[text], extra={"tool_call_id": id_})
            case {"type": kind}:
                draft.content.append(self._notes.mark(kind))
            case _:
                self._notes.add("block of a message that is none")
        return None

    def _call(self, draft: Draft, id_: object, name: object, arguments: object) -> None:
        try:
            draft.call(id_, name, arguments)
        except BadDataError:
            self._notes.add("tool call whose arguments are nested too deeply")

    def _result(self, content: object) -> str:
        if isinstance(content, str):
            return content
        parts = content if isinstance(content, list) else []
        holder = Draft(role="user", created=0.0)
        for part in parts:
            self._block(holder, part)
        return "\n\n".join(holder.content)


def _answer(message: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of an answer, as in MyLLM's done events."""
    answer: dict[str, Any] = {}
    if isinstance(model := message.get("model"), str):
        answer["model"] = model
    if (reason := FINISH.get(str(message.get("stop_reason")))) is not None:
        answer["finish_reason"] = reason
    usage = message.get("usage")
    if isinstance(usage, dict):
        read, written, cached, made = (
            value if isinstance(value := usage.get(key), int) else 0
            for key in (
                "input_tokens",
                "cache_creation_input_tokens",
                "cache_read_input_tokens",
                "output_tokens",
            )
        )
        answer["usage"] = {
            "prompt_tokens": read + written + cached,
            "cached_tokens": cached,
            "completion_tokens": made,
        }
    return answer
