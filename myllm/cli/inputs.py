"""What stdin means to a plain `gen`: bytes → a text or a conversation, and where a prompt takes it.

Pure: no streams, no click. Records, one a line, are `input_records.py`'s.

- A UTF-8 byte order mark is dropped, and so is the newline that ends the last line; NUL bytes are
  text like any other. What is not UTF-8 is refused, never replaced.
- `{}` in a prompt is where the text of stdin goes; `{{}}` is a literal `{}`; other braces are nothing
  special.
"""

from __future__ import annotations

import re
from typing import Any, Final, NamedTuple

from myllm.cli.input_records import BOM, Record, Skipped, is_passing, loads, parse_jsonl
from myllm.errors import BadDataError, UsageError
from myllm.protocol import MAX_MESSAGE, ROLES

MAX_INPUT: Final = MAX_MESSAGE - 1024 * 1024
"""Bytes of stdin that can be one request, with room for its escapes."""
_PLACES: Final = r"\{\{\}\}|\{\}"

Message = dict[str, str]


class Given(NamedTuple):
    """What came on stdin: a text, or a conversation; both None where nothing was read."""

    text: str | None = None
    messages: list[Message] | None = None

    def __bool__(self) -> bool:
        return bool(self.text) or self.messages is not None


class UpstreamError(BadDataError):
    """The MyLLM command whose stream is read here failed; its error line is passed on."""

    exit_status = 1

    def __init__(self, error: dict[str, str], line: bytes) -> None:
        super().__init__(f"stdin: the command before failed: {error.get('message', 'no reason given')}")
        self.line = line


def parse_input(data: bytes, mode: str = "auto", field: str | None = None) -> Given:
    """All of stdin as a plain `gen` takes it.

    `auto` takes text, except for MyLLM's own stream (the text is its `full_text`s, a blank line
    between them) and lines of role and content (one conversation); the first line that is not blank
    decides. Raises BadDataError where the rest is not what the first line promised, UpstreamError
    for a stream that ended in an error, UsageError for `lines`.
    """
    if mode == "lines":
        raise UsageError("--input lines: many prompts; give --batch or --map with it")
    text = decode_text(data)
    if mode == "text":
        return Given(text=text)
    first = _object(text.lstrip().partition("\n")[0])
    if first is not None and _is_turn(first):
        return Given(messages=_conversation(text))
    if mode == "jsonl" or (first is not None and is_event(first)):
        return _from_records(text, field)
    return Given(text=text)


def decode_text(data: bytes) -> str:
    """UTF-8 text without byte order mark and final newline. Raises BadDataError naming the byte."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        hint = "it looks like UTF-16; " if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise BadDataError(
            f"stdin: not UTF-8 at byte {error.start:,}; {hint}convert it first, say with iconv"
        ) from error
    return text.removeprefix(BOM.decode()).removesuffix("\n").removesuffix("\r")


def compose(given: Given, prompt: str | None) -> dict[str, Any]:
    """The part of a request that says what to answer: `prompt` or `messages`.

    A text comes first, then a blank line and the prompt, unless the prompt places it with `{}`; after
    a conversation the prompt is the next turn. Raises UsageError where there is nothing to answer.
    """
    if given.messages is not None:
        if prompt is not None and has_place(prompt):
            raise UsageError(
                "prompt: {} takes a text, and stdin is a conversation; write {{}} for a literal {}"
            )
        turn = [] if prompt is None else [{"role": "user", "content": fill(prompt, None)}]
        return {"messages": [*given.messages, *turn]}
    if prompt is None:
        if not given.text:
            raise UsageError("stdin: empty, and no prompt; type `myllm gen 'your prompt'` or pipe text in")
        return {"prompt": given.text}
    if given.text == "" and has_place(prompt):
        raise UsageError(
            "stdin: empty, and the prompt places it at {}; give it text, or -n to keep {} as it is"
        )
    if not given.text:
        return {"prompt": fill(prompt, None)}
    if has_place(prompt):
        return {"prompt": fill(prompt, given.text)}
    return {"prompt": f"{given.text}\n\n{fill(prompt, None)}"}


def has_place(prompt: str) -> bool:
    """Whether the prompt says where text goes."""
    return any(match[0] == "{}" for match in re.finditer(_PLACES, prompt))


def fill(prompt: str, text: str | None) -> str:
    """The prompt with `text`, as it is, at every `{}`; None leaves them. `{{}}` becomes `{}`."""
    return re.sub(_PLACES, lambda match: "{}" if match[0] != "{}" or text is None else text, prompt)


def is_event(message: dict[str, Any]) -> bool:
    """Whether a JSON object is a line of MyLLM's own stream."""
    if message.get("done") is True:
        return isinstance(message.get("full_text"), str) or isinstance(message.get("error"), dict)
    return is_passing(message)


def _is_turn(message: dict[str, Any]) -> bool:
    return message.get("role") in ROLES and isinstance(message.get("content"), str)


def _conversation(text: str) -> list[Message]:
    turns = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            message = _object(line)
            if message is None or not _is_turn(message):
                raise BadDataError(
                    f"stdin, line {number}: not an object of role and content as the lines before; "
                    "correct it, or give --input text"
                )
            turns.append({"role": message["role"], "content": message["content"]})
    return turns


def _from_records(text: str, field: str | None) -> Given:
    """The texts of JSONL records with a blank line between them; of a single one also its messages."""
    records: list[Record] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            parsed = parse_jsonl(line.encode(), field)
        except BadDataError as error:
            raise BadDataError(f"stdin, line {number}: {error}; correct it, or give --input text") from error
        if isinstance(parsed, Skipped):
            continue
        if parsed.upstream_error is not None:
            raise UpstreamError(parsed.upstream_error, line.encode())
        records.append(parsed)
    if not records:
        raise BadDataError("stdin: a MyLLM stream without its last line; the command before was cut off")
    if len(records) == 1 and records[0].messages is not None:
        return Given(messages=records[0].messages)
    if any(record.text is None for record in records):
        raise BadDataError("stdin: several conversations; give --batch to answer each")
    return Given(text="\n\n".join(record.text or "" for record in records))


def _object(line: str) -> dict[str, Any] | None:
    """The JSON object that a line is, if it is one."""
    if not line.lstrip().startswith("{"):
        return None
    try:
        return loads(line.encode())
    except BadDataError:
        return None
