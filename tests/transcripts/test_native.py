"""Our own export: what goes out comes back the same, and nothing else is taken in."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.conversation import Message, Session, State
from myllm.errors import BadDataError
from myllm.transcripts import json_lines, native
from myllm.transcripts.transcript import LAST_MOMENT, Notes, Transcript

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=4)
SECONDS = st.floats(0, LAST_MOMENT)
VALUES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1, 1) | TEXTS
OBJECTS = st.dictionaries(
    TEXTS, VALUES | st.lists(st.dictionaries(TEXTS, VALUES, max_size=1), max_size=1), max_size=1
)


@st.composite
def transcripts(draw: st.DrawFn) -> Transcript:
    """Any session with any tree, its messages in the order of their making."""
    ids = draw(st.lists(NAMES, unique=True, max_size=8))
    messages = [
        Message(
            id=id_,
            parent=draw(st.sampled_from([None, *ids[:place]])),
            role=draw(st.sampled_from(native.ROLES)),
            content=draw(TEXTS),
            created=draw(SECONDS),
            state=draw(st.sampled_from(State)),
            reasoning=draw(TEXTS),
            extra=draw(OBJECTS),
            tokens=draw(st.dictionaries(TEXTS, st.integers(0, 2**40), max_size=2)),
            answer=draw(OBJECTS),
        )
        for place, id_ in enumerate(ids)
    ]
    optional = st.none() | NAMES
    session = Session(
        id=draw(NAMES),
        name=draw(optional),
        created=draw(SECONDS),
        updated=draw(SECONDS),
        head=draw(st.sampled_from([None, *ids])),
        model=draw(optional),
        system=draw(st.none() | TEXTS),
        settings=draw(OBJECTS),
        parent=draw(optional),
        forked_at=draw(st.sampled_from([None, *ids])),
        owner=draw(NAMES),
        directory=draw(optional),
        n_messages=draw(st.integers(0, 10)),
        extra=draw(OBJECTS),
    )
    return Transcript(session, messages)


def imported(data: bytes) -> list[Transcript]:
    return list(native.parse(json_lines.lines(BytesIO(data)), Notes(), 0.0))


@given(st.lists(transcripts(), max_size=2, unique_by=lambda transcript: transcript.session.id))
def test_what_is_exported_is_imported_the_same(given_: list[Transcript]) -> None:
    data = b"".join(line for transcript in given_ for line in native.export(transcript))
    assert imported(data) == given_


TALK = Transcript(
    Session(id="s", name="ada", created=1.0, updated=2.0, head="b", n_messages=2),
    [
        Message(id="a", parent=None, role="user", content="Hello", created=1.0),
        Message(id="b", parent="a", role="assistant", content="Hi", created=2.0, state=State.CUT),
    ],
)


def test_a_session_comes_first_then_a_message_a_line() -> None:
    session, *messages = map(json.loads, native.export(TALK))
    assert (session["format"], session["version"], session["messages"], session["id"]) == (
        "myllm-session",
        1,
        2,
        "s",
    )
    assert [message["id"] for message in messages] == ["a", "b"]


def changed(line: int, **values: Any) -> bytes:
    """The export of TALK with some values of one line changed, or taken away where they are None."""
    records = [json.loads(data) for data in native.export(TALK)]
    records[line] = {**records[line], **values}
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


WHOLE = b"".join(native.export(TALK))
FIRST, SECOND, THIRD = WHOLE.splitlines(keepends=True)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (changed(0, version=2), "line 1: version 2 of the format"),
        (changed(0, format="other"), "line 1: expected the line of a session"),
        (changed(0, created=-1), "line 1: created: expected seconds"),
        (changed(0, updated="2026-01-01"), "line 1: updated: expected seconds"),
        (changed(0, name="a\x1b[31mb"), "line 1: name: expected printable"),
        (changed(0, owner=""), "line 1: owner: expected printable"),
        (changed(0, head="z"), "line 1: session 's': its head 'z' is none of its messages"),
        (changed(0, forked_at="z"), "line 1: session 's': its fork 'z'"),
        (changed(0, messages=3), "line 1: session 's': only 2 of its 3 messages follow"),
        (changed(0, messages=1, head="a"), "line 3: expected the line of a session"),
        (changed(0, messages=-1), "line 1: messages: expected a count"),
        (changed(0, messages=2**63), "line 1: messages: expected a count"),
        (changed(0, messages=True), "line 1: messages: expected a count"),
        (changed(0, settings=[]), "line 1: settings: expected an object"),
        (changed(1, parent="a"), "line 2: message 'a': its parent 'a' does not come before it"),
        (changed(1, parent="b"), "line 2: message 'a': its parent 'b' does not come before it"),
        (changed(2, parent="z"), "line 3: message 'b': its parent 'z' does not come before it"),
        (changed(2, id="a"), "line 3: message 'a': a second one with this id"),
        (changed(2, role="system"), "line 3: role: expected one of user, assistant, tool"),
        (changed(2, role=["user"]), "line 3: role: expected one of"),
        (changed(2, state="lost"), "line 3: state: expected one of"),
        (changed(2, content=None), "line 3: content: expected a text"),
        (changed(2, tokens={"t": 1.5}), "line 3: tokens.t: expected a count"),
        (changed(2, unheard=1), "line 3: 'unheard': unknown key"),
        (changed(2, created=1e300), "line 3: created: expected seconds"),
        (FIRST + SECOND.replace(b'"content":"Hello",', b"") + THIRD, "line 2: content: missing"),
        (FIRST + FIRST + SECOND, "line 2: a session's line where messages"),
        (WHOLE + WHOLE, "line 4: a second session with the id 's'"),
        (FIRST + b"[1]\n" + THIRD, "line 2: not a JSON object"),
        (FIRST + b"{\n" + THIRD, "line 2: not JSON"),
        (FIRST + SECOND, "only 1 of its 2 messages follow; the file was cut"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_refused_by_its_line(data: bytes, said: str) -> None:
    with pytest.raises(BadDataError) as refused:
        imported(data)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_cases_above_begin_with_a_file_that_is_taken() -> None:
    assert imported(WHOLE) == [TALK]


def test_values_nested_deeper_than_can_be_written_are_refused() -> None:
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    with pytest.raises(BadDataError, match="line 3: cannot be written"):
        imported(changed(2, extra=deep))


def test_a_line_longer_than_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(BadDataError, match="line 2: longer than 20 bytes"):
        list(json_lines.lines(BytesIO(b"short\n" + b"x" * 21 + b"\n"), longest=20))


def test_text_that_utf_8_cannot_carry_is_not_exported() -> None:
    broken = Transcript(replace(TALK.session, system="\ud83d"), TALK.messages)
    with pytest.raises(BadDataError, match="'s': cannot be exported"):
        list(native.export(broken))


@given(data=st.binary(max_size=300))
def test_any_bytes_are_refused_or_taken_but_never_a_surprise(data: bytes) -> None:
    for start in (b"", FIRST, FIRST + SECOND):
        try:
            imported(start + data)
        except BadDataError as error:
            assert str(error).startswith("line ")  # noqa: PT017 — it need not be refused


def test_a_chain_of_many_messages_costs_no_recursion(read_bytes: Callable[..., Any]) -> None:
    many = [
        Message(id=str(n), parent=str(n - 1) if n else None, role="user", content="", created=0.0)
        for n in range(20_000)
    ]
    session = replace(TALK.session, head="19999")
    data = b"".join(native.export(Transcript(session, many)))
    (transcript,), _ = read_bytes(data)
    assert len(list(transcript.path())) == 20_000
