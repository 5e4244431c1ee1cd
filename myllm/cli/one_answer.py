"""One request of a command: what is read for it, its events to stdout, notes to stderr, an exit status.

Owns what `gen` and a turn of `chat` have in common. Must not know their options but by the names that both
have, nor where models run.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from myllm.cli import options
from myllm.cli.console import Streams
from myllm.cli.inputs import MAX_INPUT, Given, UpstreamError, compose, parse_input
from myllm.cli.output import CountOutput, JsonlOutput, Output, TextOutput, losses, statistics
from myllm.cli.progress import Progress
from myllm.errors import BadDataError, DeadlineError, UnavailableError, UsageError, from_wire
from myllm.protocol import TOKEN_START, encode, parse

if TYPE_CHECKING:
    from myllm.client.client import Client
    from myllm.settings import Settings

AWAITED: Final = "text on stdin; end it with Ctrl-D, or give -n to read none"


def answer(
    streams: Streams,
    configured: Settings,
    request: dict[str, Any],
    prompt: str | None,
    values: dict[str, Any],
    *,
    as_text: bool,
    reads_stdin: bool,
) -> int:
    """Adds to the request what files, stdin and `prompt` say, and answers it; returns the exit status."""
    output = _output(streams, as_text, request["op"] == "count")

    from myllm.client import connect

    with connect(configured, streams.note) as client:  # first, so that the worker starts while stdin is read
        try:
            given = _read_stdin(streams, values) if reads_stdin else Given()
        except UpstreamError as error:
            output.done(error.line, parse(error.line))
            raise
        if values["files"]:
            given = _with_files(values["files"], given)
        request |= compose(given, prompt)
        event = _run(streams, client, request, output, values)
    return _conclude(streams, event, values["verbose"])


def in_session(request: dict[str, Any], values: dict[str, Any], configured: Settings) -> dict[str, Any]:
    """The request as a turn in the session that the options name, whose model comes before the configured."""
    own = {key: value for key, value in request.items() if key not in ("model", "options")}
    turn = {"op": "chat", "directory": os.getcwd()}  # noqa: PTH109 — no pathlib on the warm path
    if values["session"] is not None:
        turn["session"] = values["session"]
    if configured.default_model is not None:
        turn["default_model"] = configured.default_model
    return {**own, **options.model_part(values["model"], configured, values), **turn}


def _read_stdin(streams: Streams, values: dict[str, Any]) -> Given:
    """All of stdin. Raises BadDataError, UsageError, IOFailureError."""
    chunks: list[bytes] = []
    size = 0
    for chunk in streams.chunks(AWAITED):
        chunks.append(chunk)
        size += len(chunk)
        if size > MAX_INPUT:
            raise BadDataError(
                f"stdin: more than {MAX_INPUT:,} bytes, which no request can hold; split it, or give --batch"
            )
    return parse_input(b"".join(chunks), values["input_mode"], values["field"])


def _with_files(names: Sequence[str], given: Given) -> Given:
    """What came on stdin, behind the texts of the files. Raises UsageError where a conversation came."""
    from myllm.cli.attachments import composed, read

    if given.messages is not None:
        raise UsageError("--file: stdin is a conversation, and has its own messages; give one of them")
    return Given(text=composed([read(name, MAX_INPUT) for name in names], given.text or ""))


def _output(streams: Streams, as_text: bool, count: bool) -> Output:
    if not as_text:
        return JsonlOutput(streams)
    return CountOutput(streams) if count else TextOutput(streams)


def _run(
    streams: Streams, client: Client, request: dict[str, Any], output: Output, values: dict[str, Any]
) -> dict[str, Any]:
    """Runs one request, its events going to `output` or stderr; returns the done event.

    An interrupt ends a turn in a session as its answer's end does: what has come is kept.
    """
    progress = Progress(streams, values["progress"])

    def told(asked: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
        for line in client.stream(asked):
            if line.startswith(TOKEN_START):
                progress.close()
                output.token(line)
            elif (event := parse(line)).get("done") is not True:
                if "note" not in event:
                    progress.preparing(event)
                elif values["verbose"] or not event.get("detail"):
                    streams.note(event["note"])
        return line, event  # the last one is the done event

    try:
        line, event = told(request)
    except KeyboardInterrupt:
        if request["op"] == "chat":
            output.done(*told({"op": "cancel"}))
        raise
    except UnavailableError as error:
        from myllm.events import failed

        event = failed(error)
        line = encode(event).rstrip()
    finally:
        progress.close()
    output.done(line, event)
    return event


def _conclude(streams: Streams, event: dict[str, Any], verbose: bool) -> int:
    """Notes on stderr and the exit status. Raises what the done event says went wrong."""
    if error := event.get("error"):
        raise from_wire(error)
    if lost := losses(event):
        streams.note(lost)
    if verbose:
        streams.note(statistics(event))
    if event.get("finish_reason") == "deadline":
        raise DeadlineError("deadline: it passed; the answer is what there was until then")
    return 0
