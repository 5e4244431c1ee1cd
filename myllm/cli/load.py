"""`myllm load`: models into the daemon, which it starts; what is loaded; models out; the daemon's end.

Owns what the options of `load` mean together. Must not know how a daemon is started, found or stopped,
nor how a loaded model is printed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import click

from myllm.cli import options
from myllm.cli.console import Streams
from myllm.cli.loaded import loaded_jsonl, loaded_line, loaded_table
from myllm.cli.progress import Progress
from myllm.errors import MyllmError, UsageError, from_wire
from myllm.protocol import Message, parse

if TYPE_CHECKING:
    from myllm.client.client import Client
    from myllm.settings import Settings

NOBODY: Final = "no daemon runs; `myllm load MODEL` starts one"
ACTIONS: Final = ("list", "unload", "stop")
FOR_LOADING: Final = ("keep_alive", "pin", "template", *options.LOADING)
"""Options that say how a model is loaded and kept."""
EPILOG: Final = """\b
Examples:
  myllm load smollm2
  myllm load --keep-alive -1 smollm2 minilm
  myllm load --list
  myllm load --unload smollm2
  myllm load --stop

\b
Exit status: 0 done; 2 usage; 65 bad data; 66 no such model, or not loaded;
69 the daemon or a model's process is gone or cannot be had; 75 try again; 77
permission; 78 configuration. See `man myllm`.
"""


@click.command("load", epilog=EPILOG, short_help="Keep models warm in a daemon.")
@click.argument("models", nargs=-1, metavar="[MODEL]...", shell_complete=options.complete_model)
@options.keep_alive_option
@click.option(
    "--pin/--no-pin",
    default=None,
    help="Keep the model whatever else needs memory, or no longer.  [default: as it is]",
)
@click.option("--list", is_flag=True, help="Print what is loaded.")
@click.option("--unload", is_flag=True, help="Have MODELs go, once their running requests have ended.")
@click.option("--all", "everything", is_flag=True, help="With --unload: all that are loaded.")
@click.option("--stop", is_flag=True, help="End the daemon, once its running requests have ended.")
@options.output_options
@options.loading_options
@options.template_option
@options.progress_option
@click.pass_obj
def load(streams: Streams, /, models: tuple[str, ...], **values: Any) -> int:
    """Load MODELs into the daemon, which is started if none runs: gen and embed then find them warm.

    A model without work goes when its time is over (--keep-alive), or when another one needs the memory.
    The daemon ends by itself 5 minutes after the last one went. --list, --unload and --stop never start it.

    On a terminal a model is a line, elsewhere a JSON object.
    """
    from myllm import settings

    action = _action(models, values)
    configured = settings.load()
    as_text = options.as_text(streams, values["output"] or configured.output)
    if action == "list":
        _list(streams, as_text)
    elif action == "unload":
        _unload(streams, models)
    elif action == "stop":
        _stop(streams)
    else:
        _load(streams, configured, models, values, loaded_line if as_text else lambda e: loaded_jsonl([e]))
    return 0


def _action(models: tuple[str, ...], values: dict[str, Any]) -> str | None:
    """Which of ACTIONS is asked for, None for loading. Raises UsageError for what makes no sense together."""
    actions = [name for name in ACTIONS if values[name]]
    if len(actions) > 1:
        raise UsageError(f"--{actions[0]} and --{actions[1]}: give one of them")
    if values["everything"] and actions != ["unload"]:
        raise UsageError("--all: it goes with --unload")
    if actions:
        for name in FOR_LOADING:
            if values[name] is not None:
                raise UsageError(f"--{name.replace('_', '-')}: it does not go with --{actions[0]}")
    if actions in (["list"], ["stop"]) and models:
        raise UsageError(f"--{actions[0]}: it takes no model")
    if actions == ["unload"] and bool(models) == values["everything"]:
        raise UsageError("--unload: give either models or --all")
    if not actions and not models:
        raise UsageError("no model: type `myllm load MODEL`, or see `myllm load --list`")
    return actions[0] if actions else None


def _load(
    streams: Streams,
    configured: Settings,
    models: tuple[str, ...],
    values: dict[str, Any],
    shown: Callable[[Message], bytes],
) -> None:
    """Loads one after the other. Raises the last error, those before are notes."""
    if configured.daemon == "never":
        raise UsageError("load: MYLLM_DAEMON, or `daemon` in config.toml, is never; set it to auto first")
    keep_alive = values["keep_alive"]
    if keep_alive is None:
        keep_alive = options.keep_alive_on_the_wire(configured.keep_alive)
    request: Message = {"op": "load", "keep_alive": keep_alive}
    if values["pin"] is not None:
        request["pin"] = values["pin"]

    from myllm.client.start import daemon

    with daemon() as client, closing(Progress(streams, values["progress"])) as progress:

        def load_one(model: str) -> None:
            wanted = options.model_part(model, configured, values)
            if values["template"] is not None:
                wanted["options"] = {**wanted.get("options", {}), "template": values["template"]}
            done = _ask(client, request | wanted, progress.preparing)
            progress.close()
            streams.write(shown(done["loaded"] or {"model": done["model"]}))

        _each(streams, models, load_one)


def _list(streams: Streams, as_text: bool) -> None:
    from myllm.client.dial import dial_daemon

    client = dial_daemon()
    if client is None:
        streams.note(NOBODY)
        return
    with client:
        entries = _ask(client, {"op": "status"})["status"]["models"]
    if as_text and not entries:
        streams.note("no model is loaded")
    else:
        streams.write(loaded_table(entries) if as_text else loaded_jsonl(entries))


def _unload(streams: Streams, models: tuple[str, ...]) -> None:
    """Without models, all. Raises the last error, those before are notes."""
    from myllm.client.dial import dial_daemon
    from myllm.errors import NotFoundError

    client = dial_daemon()
    if client is None:
        if models:
            raise NotFoundError(f"{models[0]}: not loaded; no daemon runs")
        streams.note(NOBODY)
        return

    def unload(request: Message) -> None:
        for name in _ask(client, request)["unloaded"]:
            streams.note(f"{name}: unloaded")

    with client:
        if not models:
            unload({"op": "unload", "all": True})
        _each(streams, models, lambda model: unload({"op": "unload", "model": options.absolute(model)}))


def _stop(streams: Streams) -> None:
    from myllm.client.stop import stop_daemon

    pid = stop_daemon(streams.note)
    streams.note("no daemon runs" if pid is None else f"the daemon, process {pid}, has ended")


def _each(streams: Streams, models: tuple[str, ...], act: Callable[[str], None]) -> None:
    """Acts on every model, also after one failed, unless the daemon is gone. Raises the last error."""
    failures: list[MyllmError] = []
    for model in models:
        try:
            act(model)
        except Refused as refused:
            failures.append(refused.error)
    for failure in failures[:-1]:
        streams.report(failure)
    if failures:
        raise failures[-1]


class Refused(Exception):
    """The daemon's answer was `error`; it goes on."""

    def __init__(self, error: MyllmError) -> None:
        super().__init__(str(error))
        self.error = error


def _ask(client: Client, request: Message, preparing: Callable[[Message], None] = lambda e: None) -> Message:
    """The done event. Raises Refused, UnavailableError where the daemon vanishes."""
    done: Message = {}
    for line in client.stream(request):
        done = parse(line)
        if done.get("done") is not True:
            preparing(done)
    if error := done.get("error"):
        raise Refused(from_wire(error))
    return done
