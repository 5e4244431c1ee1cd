"""ChatGPT's export: `conversations.json`, a list of conversations, each a tree of nodes by their ids.

There is no published description; this follows exports and parsers in public. A node has `parent`, `children`
and `message`, which may be null; `current_node` ends the path that is shown. A message that an assistant
sends to another `recipient` than all is a tool call, and what tools answer follows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from myllm.errors import BadDataError
from myllm.transcripts.json_lines import loads
from myllm.transcripts.transcript import Notes, Transcript, clean, moment
from myllm.transcripts.tree import About, Draft, Node, assemble

SOURCE: Final = "chatgpt"
FINISH: Final = {"stop": "stop", "max_tokens": "length"}
_LONGEST_CALL: Final = 100
"""Messages of tools in a row that are taken for results of one call."""


def parse(data: bytes, notes: Notes, now: float) -> Iterator[Transcript]:
    """The conversations of an export; what has no date is of `now`. A broken one is left out and noted.

    Raises BadDataError where the whole is none.
    """
    whole = loads(data)
    conversations = [whole] if isinstance(whole, dict) else whole
    if not isinstance(conversations, list) or not any(map(is_conversation, conversations)):
        raise BadDataError("not a list of conversations with `mapping`")
    for conversation in conversations:
        if not is_conversation(conversation):
            notes.add("entry that is no conversation")
            continue
        try:
            transcript = _Conversation(conversation, notes, now).transcript()
            if transcript.messages:
                yield transcript
            else:
                notes.add("conversation without messages")
        except BadDataError as error:
            notes.add(f"conversation {clean(str(conversation.get('title')), 40)!r}, left out: {error}")


def is_conversation(value: object) -> bool:
    """Whether a value has the shape of one."""
    return isinstance(value, dict) and isinstance(value.get("mapping"), dict)


class _Conversation:
    def __init__(self, conversation: Mapping[str, Any], notes: Notes, now: float) -> None:
        created = moment(conversation.get("create_time"))
        self._about = About(
            source=SOURCE,
            id=str(conversation.get("conversation_id") or conversation.get("id") or ""),
            created=now if created is None else created,
            title=str(conversation.get("title") or ""),
        )
        self._head = conversation.get("current_node")
        self._mapping: dict[str, Any] = conversation["mapping"]
        self._notes = notes

    def transcript(self) -> Transcript:
        nodes = {}
        for key, node in self._mapping.items():
            drafts = [draft] if (draft := self._draft(key)) else []
            parent = node.get("parent") if isinstance(node, dict) else None
            nodes[key] = Node(parent if isinstance(parent, str) else None, drafts)
        return assemble(self._about, nodes, self._head if isinstance(self._head, str) else None)

    def _message(self, key: object) -> Mapping[str, Any]:
        node = self._mapping.get(key) if isinstance(key, str) else None
        message = node.get("message") if isinstance(node, dict) else None
        return message if isinstance(message, dict) else {}

    def _draft(self, key: str) -> Draft | None:
        """What a node says; system prompts are the conversation's."""
        message = self._message(key)
        role, content = _role(message), message.get("content")
        if not message or not isinstance(content, dict):
            return None
        created = moment(message.get("create_time"))
        match message.get("metadata"):
            case {"attachments": [*files]}:
                for _ in files:
                    self._notes.add("attached file")
        draft = Draft(role=role, created=self._about.created if created is None else created)
        self._fill(draft, content)
        if role == "system" or content.get("content_type") == "user_editable_context":
            self._about.system["\n\n".join(filter(None, draft.content))] = None
            return None
        if role == "assistant":
            draft.answer = _answer(message)
            if (recipient := message.get("recipient") or "all") != "all":
                draft.call(key, recipient, _arguments("\n\n".join(draft.content)))
                draft.content = []
        elif role == "tool":
            draft.extra = self._result_of(key, message)
        elif role != "user":
            self._notes.add(f"message of role {role:.40}")
            return None
        return draft

    def _result_of(self, key: str, message: Mapping[str, Any]) -> dict[str, Any]:
        """A tool's name, and the id of the call that its message answers."""
        author = message.get("author")
        name = author.get("name") if isinstance(author, dict) else None
        extra = {"name": clean(name)} if isinstance(name, str) else {}
        for _ in range(_LONGEST_CALL):
            key = self._mapping[key].get("parent")
            role = _role(above := self._message(key))
            if role == "assistant" and (above.get("recipient") or "all") != "all":
                return {**extra, "tool_call_id": clean(key)}
            if role != "tool":
                break
        return extra

    def _fill(self, draft: Draft, content: Mapping[str, Any]) -> None:
        """Adds a content of any type to a message."""
        match content:
            case {"content_type": "thoughts", "thoughts": list(thoughts)}:
                draft.reasoning += [_thought(thought) for thought in thoughts]
            case {"content_type": "reasoning_recap"}:
                self._notes.add("summary of how long the model thought")
            case {"content_type": "user_editable_context"}:
                given = (content.get("user_profile"), content.get("user_instructions"))
                draft.content += [text for text in given if isinstance(text, str)]
            case {"parts": list(parts)}:
                draft.content += map(self._part, parts)
            case {"text": str(text)} | {"result": str(text)}:
                draft.content.append(text)
            case {"content_type": kind}:
                draft.content.append(self._notes.mark(kind))

    def _part(self, part: Any) -> str:
        match part:
            case str():
                return part
            case {"text": str(text)}:
                return text
            case {"content_type": str(kind)}:
                return self._notes.mark(kind.removesuffix("_asset_pointer"))
        return self._notes.mark("part")


def _role(message: Mapping[str, Any]) -> str:
    author = message.get("author")
    return str(author.get("role")) if isinstance(author, dict) else ""


def _thought(thought: Any) -> str:
    match thought:
        case {"summary": str(summary), "content": str(content)}:
            return "\n".join(filter(None, (summary, content)))
        case {"content": str(text)} | {"summary": str(text)}:
            return text
    return ""


def _arguments(text: str) -> Any:
    """A call's arguments: the object that a text is, or the text, which may be a program, as `input`."""
    try:
        return text if isinstance(loads(text.encode()), dict) else {"input": text}
    except BadDataError:
        return {"input": text}


def _answer(message: Mapping[str, Any]) -> dict[str, Any]:
    match message.get("metadata"):
        case {"model_slug": str(model), "finish_details": {"type": str(kind)}} if kind in FINISH:
            return {"model": model, "finish_reason": FINISH[kind]}
        case {"model_slug": str(model)}:
            return {"model": model}
    return {}
