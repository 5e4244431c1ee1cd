"""`myllm chat`: a conversation that is kept; a turn a call in a pipe, a prompt at a terminal."""

from __future__ import annotations

from typing import Any

import click

from myllm.cli import options
from myllm.cli.console import Streams
from myllm.cli.one_answer import answer, in_session
from myllm.errors import NotFoundError, UsageError
from myllm.settings import DEFAULT_MODEL, Settings

EPILOG = """\b
Examples:
  myllm chat
  echo 'My name is Ada.' | myllm chat -s ada -t
  echo 'What is my name?' | myllm chat -s ada -t
  myllm chat -c -f notes.txt 'Is anything missing in these?'
  myllm chat -n 'Say hello.' | jq -r 'select(.done).session_id'

\b
Exit status: 0 answered; 2 usage; 65 bad data; 66 no such model, session or file;
67 the message does not fit the window; 69 the model's process is gone; 74 I/O;
75 another command has the session; 78 configuration; 124 deadline. See `man myllm`.
"""


@click.command("chat", epilog=EPILOG, short_help="Hold a conversation that is kept.")
@click.argument("prompt", required=False)
@options.model_option("the session's, else " + DEFAULT_MODEL)
@options.session_option("The session, by name or id; one of this name is made where there is none.")
@click.option(
    "-c", "--continue", "last", is_flag=True, help="Go on with the last session, of this folder first."
)
@click.option("--system", metavar="TEXT", help="System message of the session, from now on.")
@click.option("-n", "--no-stdin", is_flag=True, help="Do not read stdin.")
@options.input_options(
    "What stdin is. auto: text, unless it is MyLLM's own stream or lines of role and content."
)
@options.output_options
@options.files_option
@options.sampling_options
@options.template_option
@options.deadline_option
@options.loading_options
@options.nice_option("0")
@options.daemon_option
@options.progress_option
@click.option("-v", "--verbose", is_flag=True, help="A line of statistics on stderr.")
@click.pass_obj
def chat(streams: Streams, /, prompt: str | None, **values: Any) -> int:
    """Take a turn in a session, with PROMPT, stdin, or both; at a terminal, as many as you like.

    What was said before in the session goes along; the oldest turns are left out when the window is full, and
    stderr says so. What you say is kept before it is answered, and the answer when it ends. Without -s and -c
    a session begins, whose id the last event names.
    """
    if values["last"] and values["session"] is not None:
        raise UsageError("--continue and --session: give one of them")
    configured = options.configured(values)
    as_text = options.as_text(streams, values["output"] or configured.output)
    request = in_session(_request(values), values, configured)
    if prompt is None and streams.stdin_is_terminal and not values["no_stdin"] and not values["files"]:
        return _at_a_terminal(streams, configured, request)
    reads_stdin = not values["no_stdin"] and not streams.stdin_is_terminal
    if prompt is None and not reads_stdin and not values["files"]:
        raise UsageError("no prompt: type `myllm chat 'your message'`, or pipe text in")
    return answer(streams, configured, request, prompt, values, as_text=as_text, reads_stdin=reads_stdin)


def _at_a_terminal(streams: Streams, configured: Settings, request: dict[str, Any]) -> int:
    """Turns until the user leaves."""
    from myllm import paths
    from myllm.cli.repl import converse
    from myllm.client import connect
    from myllm.storage.sessions import SQLiteSessions

    store = SQLiteSessions(paths.state_dir())
    wanted, last = request.pop("session", None), request.pop("last", False)
    session = None
    if last:
        session = store.last(directory=request["directory"])
    elif wanted is not None:
        try:
            session = store.find(wanted)
        except NotFoundError:
            session = store.create(wanted, directory=request["directory"])
    if last and session is None:
        raise NotFoundError("session: there is none to go on with; begin one with `myllm chat`")
    of_turn = {key: value for key, value in request.items() if key not in ("op", "directory")}
    try:
        return converse(
            streams, lambda: connect(configured, streams.note), store, configured, session, of_turn
        )
    finally:
        store.close()


def _request(values: dict[str, Any]) -> dict[str, Any]:
    """What is asked of the model, whatever is said."""
    request: dict[str, Any] = options.sampling_parameters(values)
    request |= {name: values[name] for name in ("system", "template") if values[name] is not None}
    if values["last"]:
        request["last"] = True
    if values["nice"] is not None:
        request["priority"] = values["nice"]
    if values["deadline"] is not None:
        request["deadline_ms"] = values["deadline"] * 1000
    return request
