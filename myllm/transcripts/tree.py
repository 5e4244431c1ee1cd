"""Building a transcript from what another program kept: nodes that name their parents, in any order.

Owns how answers that come in pieces are put together, and the shape of tool calls (OpenAI's). Must not know
any program's format.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from myllm.conversation import Message, Session
from myllm.errors import BadDataError
from myllm.transcripts.json_lines import dumps
from myllm.transcripts.transcript import Transcript, clean


@dataclass(slots=True, kw_only=True, eq=False)
class Draft:
    """A message under way. Its pieces are joined at the end, as a file may have many."""

    role: str
    created: float
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(any(self.content) or any(self.reasoning) or self.calls or self.role == "tool")

    def call(self, id_: object, name: object, arguments: object) -> None:
        """A tool call; `arguments` that are no text become JSON. Raises BadDataError where they cannot."""
        written = arguments if isinstance(arguments, str) else dumps(arguments)
        function = {"name": clean(str(name)), "arguments": written}
        self.calls.append({"id": clean(str(id_)), "type": "function", "function": function})

    def goes_on_in(self, other: Draft) -> bool:
        """Whether `other`, which follows, is more of the same answer. Text after calls is a new one."""
        return self.role == other.role == "assistant" and not (self.calls and any(other.content))

    def take(self, other: Draft) -> None:
        """Goes on with the pieces of `other`."""
        self.content += other.content
        self.reasoning += other.reasoning
        self.calls += other.calls
        self.extra |= other.extra
        self.answer |= other.answer

    def message(self, id_: str, parent: str | None) -> Message:
        """The whole message."""
        return Message(
            id=id_,
            parent=parent,
            role=self.role,
            content="\n\n".join(filter(None, self.content)),
            reasoning="\n\n".join(filter(None, self.reasoning)),
            created=self.created,
            extra={**self.extra, **({"tool_calls": self.calls} if self.calls else {})},
            answer=self.answer,
        )


class Node(NamedTuple):
    """What one record of a file adds to the tree: nothing, or messages that follow one another."""

    parent: str | None
    """The record before; one that is not in the file counts as none."""
    drafts: list[Draft]


@dataclass(slots=True, kw_only=True)
class About:
    """What is known of a conversation beside its messages."""

    source: str
    """The program it comes from."""
    id: str
    created: float
    title: str = ""
    system: dict[str, None] = field(default_factory=dict)
    """System prompts in their order, each once."""
    directory: object = None

    def session(self, head: str | None, messages: Sequence[Message]) -> Session:
        """The session, all but the length of its path; what is shown in tables is made printable."""
        models = [clean(message.answer["model"]) for message in messages if "model" in message.answer]
        title, directory = clean(self.title), self.directory
        return Session(
            id=clean(self.id) or self.source,
            name=None,
            created=self.created,
            updated=max((self.created, *(message.created for message in messages))),
            head=head,
            model=models[-1] or None if models else None,
            system="\n\n".join(filter(None, self.system)) or None,
            directory=directory or None if isinstance(directory, str) and directory.isprintable() else None,
            extra={"source": self.source, **({"title": title} if title else {})},
        )


def assemble(about: About, nodes: Mapping[str, Node], head: str | None) -> Transcript:
    """The transcript of nodes by their keys, whose conversation ends at `head`, else at the last message.

    Ids are numbers from 1, each greater than its parent's. Raises BadDataError where parents go in a circle.
    """
    messages, tips = _grown(nodes)
    session = about.session(tips.get(head) or (messages[-1].id if messages else None), messages)
    return counted(Transcript(session, messages))


def counted(transcript: Transcript) -> Transcript:
    """The same, its session saying how many messages are along the path."""
    session = replace(transcript.session, n_messages=sum(1 for _ in transcript.path()))
    return Transcript(session, transcript.messages)


def chain(drafts: Iterable[Draft]) -> dict[str, Node]:
    """Nodes that follow one another, with nothing to either side."""
    nodes: dict[str, Node] = {}
    for number, draft in enumerate(drafts):
        nodes[str(number)] = Node(str(number - 1) if number else None, [draft])
    return nodes


def _grown(nodes: Mapping[str, Node]) -> tuple[list[Message], dict[str | None, str | None]]:
    """The messages, each after its parent, and by each node's key the last message up to there."""
    children: dict[str | None, list[str]] = defaultdict(list)
    for key, node in nodes.items():
        children[node.parent if node.parent in nodes else None].append(key)
    placed: list[tuple[Draft, int | None]] = []  # and where the parent is
    tips: dict[str | None, int | None] = {None: None}
    extensible: dict[str | None, bool] = {None: False}  # whether nothing else hangs from the last message
    waiting = children[None][::-1]
    while waiting:
        key = waiting.pop()
        node = nodes[key]
        parent = node.parent if node.parent in nodes else None
        tip = tips[parent]
        alone = extensible[parent] and len(children[parent]) == 1
        for draft in filter(None, node.drafts):
            if alone and tip is not None and placed[tip][0].goes_on_in(draft):
                placed[tip][0].take(draft)
            else:
                placed.append((draft, tip))
                tip = len(placed) - 1
            alone = True
        tips[key], extensible[key] = tip, alone
        waiting += children[key][::-1]
    if len(tips) <= len(nodes):
        raise BadDataError("its messages follow one another in a circle")
    ids = [str(number) for number in range(1, len(placed) + 1)]
    messages = [
        draft.message(id_, None if parent is None else ids[parent])
        for id_, (draft, parent) in zip(ids, placed, strict=True)
    ]
    return messages, {key: None if tip is None else ids[tip] for key, tip in tips.items()}
