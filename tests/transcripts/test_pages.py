"""Conversations to read: Markdown that holds everything and cannot be broken out of, and plain text."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.conversation import Message, Session, State
from myllm.transcripts import markdown, plain
from myllm.transcripts.transcript import Transcript

CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"```"}'}}
SESSION = Session(
    id="s1",
    name="ada",
    created=0.0,
    updated=86400.0,
    head="d",
    model="smollm2",
    system="Be brief.\n# not a heading",
    settings={"temperature": 0.5},
    directory="/home/ada",
)
MESSAGES = [
    Message(id="a", parent=None, role="user", content="Weather?\n```\n# no end", created=1.0),
    Message(
        id="b",
        parent="a",
        role="assistant",
        content="",
        created=2.0,
        reasoning="Ask a tool.",
        extra={"tool_calls": [CALL]},
        answer={"model": "smollm2", "finish_reason": "tool_calls"},
    ),
    Message(
        id="c",
        parent="b",
        role="tool",
        content="sunny",
        created=3.0,
        extra={"name": "weather", "tool_call_id": "c1"},
    ),
    Message(
        id="d",
        parent="c",
        role="assistant",
        content="Sunny",
        created=4.0,
        state=State.CUT,
        answer={"model": "smollm2", "finish_reason": "length"},
    ),
    Message(id="x", parent="a", role="assistant", content="another branch", created=5.0),
]
TALK = Transcript(SESSION, MESSAGES)

PAGE = """\
# ada

- Session: `s1`
- Model: `smollm2`
- Directory: `/home/ada`
- Begun: 1970-01-01 00:00:00Z
- Changed: 1970-01-02 00:00:00Z
- Settings: `{"temperature":0.5}`

## System

> Be brief.
> # not a heading

## User · 1970-01-01 00:00:01Z

> Weather?
> ```
> # no end

## Assistant · `smollm2` · 1970-01-01 00:00:02Z · finish reason: tool\\_calls

### Reasoning

> Ask a tool.

### Calls `weather` `c1`

````json
{"city":"```"}
````

## Tool · `weather` · `c1` · 1970-01-01 00:00:03Z

> sunny

## Assistant · `smollm2` · 1970-01-01 00:00:04Z · cut · finish reason: length

> Sunny
"""


def page_of(transcript: Transcript) -> str:
    return "".join(markdown.render(transcript))


def test_a_page_holds_all_of_the_path() -> None:
    assert page_of(TALK) == PAGE


def one(content: str, **values: Any) -> Transcript:
    session = Session(id="s", name=None, created=0.0, updated=0.0, head="m")
    return Transcript(
        session, [Message(id="m", parent=None, role="user", content=content, created=0.0, **values)]
    )


def outside_quotes(page: str) -> list[str]:
    return [line for line in re.split(r"\r\n|\r|\n", page) if not line.startswith(">")]


@given(st.text(max_size=60) | st.text("\r\n #`-=>~<!", max_size=60))
def test_no_content_reaches_beyond_its_quote_and_none_is_lost(content: str) -> None:
    page = page_of(one(f"x{content}"))
    assert outside_quotes(page) == outside_quotes(page_of(one("x")))
    quoted = [line.removeprefix(">").removeprefix(" ") for line in page.split("\n") if line.startswith(">")]
    assert "\n".join(quoted) == re.sub(r"\r\n|\r", "\n", f"x{content}")


@pytest.mark.parametrize("arguments", ["```\n# out", "````", "`" * 30])
def test_no_fence_ends_within_a_tools_arguments(arguments: str) -> None:
    call = {"function": {"name": "f", "arguments": arguments}}
    page = page_of(one("", extra={"tool_calls": [call]}))
    fence = re.search("^(`{3,})json$", page, re.MULTILINE)
    assert fence is not None
    assert page.count(f"\n{fence[1]}\n") == 1
    assert page.endswith(f"\n{arguments}\n{fence[1]}\n")


@pytest.mark.parametrize("title", ["*a* <b>\n# c", "`a", "![x](http://x)"])
def test_a_title_is_one_line_of_text(title: str) -> None:
    session = Session(id="s", name=None, created=0.0, updated=0.0, extra={"title": title})
    heading, blank, *_ = page_of(Transcript(session, [])).split("\n")
    assert blank == ""
    assert re.sub(r"\\(.)", r"\1", heading) == "# " + " ".join(title.split())
    assert not re.search(r"(?<!\\)[*<`\[!#]", heading[2:])


@pytest.mark.parametrize("calls", ["x", 5, {"a": 1}, [5, None, {"function": "f"}, {"function": {"name": 1}}]])
def test_calls_of_any_shape_are_shown_somehow(calls: Any) -> None:
    assert page_of(one("hi", extra={"tool_calls": calls}))
    assert "".join(plain.render(one("hi", extra={"tool_calls": calls})))


def test_text_shows_who_said_what_and_when() -> None:
    assert (
        "".join(plain.render(TALK))
        == """\
ada · s1 · smollm2 · 1970-01-02 00:00:00Z

[system]
Be brief.
# not a heading

[user · 1970-01-01 00:00:01Z · a]
Weather?
```
# no end

[assistant · smollm2 · 1970-01-01 00:00:02Z · b]
→ weather({"city":"```"})

[tool weather · 1970-01-01 00:00:03Z · c]
sunny

[assistant · smollm2 · 1970-01-01 00:00:04Z · d · cut]
Sunny
"""
    )


def test_contents_are_left_as_they_are_for_the_terminal_to_escape() -> None:
    assert "a\x1b[31mb" in "".join(plain.render(one("a\x1b[31mb")))
