"""Options that several commands share, and how their values become parts of a request.

Owns names, help and value checks of the model, input, loading, sampling, output and daemon options. Must not
know what is done with them; ranges are the protocol's to check.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from myllm.cli.console import Streams
from myllm.errors import MyllmError
from myllm.protocol import KV_TYPES, OVERFLOW, SAMPLING, checked_number

if TYPE_CHECKING:
    from myllm.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])
Decorator = Callable[[F], F]

LOGIT_BIAS: Final = "logit_bias."
MAX_BIAS: Final = 1e9
PATIENT: Final = 1
"""The priority of many in flight: whoever waits at a terminal comes first."""
LOADING: Final = ("context", "parallel", "kv_type", "flash_attn", "threads", "gpu_layers")
"""Fields of LoadOptions that every command which loads has as options."""
TEMPLATE_ENDS: Final = (".jinja", ".jinja2", ".j2")
"""How a template's file is called; what has a slash is a path as well, anything else a name."""
NAMED: Final = ("temperature", "top_p", "top_k", "min_p", "repeat_penalty")
"""Sampling parameters with an option of their own; the others are for `--set`."""


def duration(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """Seconds in `20s`, `5m`, `500ms`."""
    if text is None:
        return None
    from myllm.settings import parse_duration

    try:
        return parse_duration(text)
    except MyllmError as error:
        raise click.BadParameter(str(error), ctx, param) from error


def _keep_alive(ctx: click.Context, param: click.Parameter, text: str | None) -> float | None:
    """What a request says for `30m`, `0` or `-1`: seconds, or -1 for ever; None where nothing was given."""
    if text is None:
        return None
    from myllm.settings import parse_keep_alive

    try:
        return keep_alive_on_the_wire(parse_keep_alive(text))
    except MyllmError as error:
        raise click.BadParameter(f"{error}; 0 is not at all, -1 for ever", ctx, param) from error


def _assignments(ctx: click.Context, param: click.Parameter, texts: Sequence[str]) -> dict[str, Any]:
    """The parameters that `KEY=VALUE` texts set, with `logit_bias.TOKEN=VALUE` gathered under one key."""
    given: dict[str, Any] = {}
    for text in texts:
        key, equals, number = text.rpartition("=")  # a token may hold "="
        if not equals:
            raise click.BadParameter(f"{text!r}: expected KEY=VALUE, say dry_multiplier=0.8", ctx, param)
        token = key.removeprefix(LOGIT_BIAS)
        is_bias = key.startswith(LOGIT_BIAS) and token
        if key not in SAMPLING and not is_bias:
            raise click.BadParameter(f"{key!r}: no such parameter; {_nearest(key)}", ctx, param)
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise click.BadParameter(f"{key}: expected a number, not {number!r}", ctx, param)
        if is_bias:  # JSON has no infinity; the limit of the protocol bans as well
            given.setdefault("logit_bias", {})[token] = max(-MAX_BIAS, min(value, MAX_BIAS))
        else:
            given[key] = value
    return given


def _nearest(key: str) -> str:
    from difflib import get_close_matches

    known = [*SAMPLING, f"{LOGIT_BIAS}TOKEN"]
    near = get_close_matches(key, known, 3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Names on record and in the catalog for the shell's TAB; files for what begins like a path."""
    from click.shell_completion import CompletionItem

    from myllm import settings
    from myllm.models.names import is_path
    from myllm.models.registry import Registry

    if is_path(incomplete):
        return [CompletionItem(incomplete, type="file")]
    try:
        registry = Registry(settings.load())
        known = [model.name for model in registry.recorded()]
        known += [entry.name for entry in registry.not_pulled()]
    except MyllmError:
        return []
    return [CompletionItem(name) for name in known if name.startswith(incomplete)]


def complete_template(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """The shipped templates for the shell's TAB; files for what is like none of them."""
    from pathlib import Path

    from click.shell_completion import CompletionItem

    shipped = Path(__file__).parents[1] / "prompts" / "templates"
    names = sorted(file.stem for file in shipped.iterdir())
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def _template(ctx: click.Context, param: click.Parameter, text: str | None) -> str | None:
    """A template's name as it is, a path to its file absolute, for another process reads it."""
    if text is None or not ("/" in text or text.lower().endswith(TEMPLATE_ENDS)):
        return text
    return os.path.abspath(os.path.expanduser(text))  # noqa: PTH100, PTH111 — no pathlib on the warm path


def _combined(*decorators: Decorator[Any]) -> Decorator[Any]:
    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


def model_option(default: str, variable: str = "MYLLM_MODEL") -> Decorator[Any]:
    """`-m/--model`; `default` and the `variable` that stands for it are named in the help."""
    return click.option(
        "-m",
        "--model",
        metavar="MODEL",
        shell_complete=complete_model,
        help=f"Model's name, or a path to a GGUF file.  [env var: {variable}; default: {default}]",
    )


def input_options(what: str) -> Decorator[Any]:
    """`--input` and `--field`; `what` is the first's help, which says what `auto` means."""
    return _combined(
        click.option(
            "--input",
            "input_mode",
            type=click.Choice(["auto", "text", "lines", "jsonl"]),
            default="auto",
            show_default=True,
            help=what,
        ),
        click.option(
            "--field",
            metavar="NAME",
            help="Key of a JSONL record's text.  "
            "[default: the first of text, prompt, content, full_text, input]",
        ),
    )


def complete_session(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
    """Sessions' names for the shell's TAB."""
    from myllm.cli import session_choice

    return session_choice.complete_session(ctx, param, incomplete)


def session_option(text: str) -> Decorator[Any]:
    """`-s/--session` with this help."""
    return click.option("-s", "--session", metavar="SESSION", shell_complete=complete_session, help=text)


files_option = click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="A text file to go before the prompt, under its name; may be given several times.",
)

template_option = click.option(
    "--template",
    metavar="NAME|FILE",
    callback=_template,
    shell_complete=complete_template,
    help="Chat template: the name of one that is shipped or in the model's file, or a file of Jinja.  "
    "[default: the model's own]",
)

output_options = _combined(
    click.option(
        "-o",
        "--output",
        type=click.Choice(["auto", "text", "jsonl"]),
        help="auto is text on a terminal and JSONL otherwise.  [env var: MYLLM_OUTPUT; default: auto]",
    ),
    click.option("-t", "output", flag_value="text", help="The same as --output text."),
)

daemon_option = click.option(
    "--no-daemon",
    is_flag=True,
    help="Run by itself, though a daemon answers.  [env var: MYLLM_DAEMON=never]",
)

keep_alive_option = click.option(
    "--keep-alive",
    metavar="TIME",
    callback=_keep_alive,
    help="How long the model stays without work: 30m, 0 (not at all) or -1 (for ever).  "
    "[env var: MYLLM_KEEP_ALIVE; default: 30m]",
)

progress_option = click.option(
    "--progress/--no-progress",
    default=None,
    help="Show bars on stderr, or not.  [default: if it is a terminal]",
)

loading_options = _combined(
    click.option("--context", type=click.INT, metavar="N", help="Window in tokens.  [default: by need]"),
    click.option(
        "--parallel",
        type=click.INT,
        metavar="N",
        help="Sequences at once, at most.  [default: measured]",
    ),
    click.option("--kv-type", type=click.Choice(KV_TYPES), help="Type of the KV cache.  [default: f16]"),
    click.option(
        "--flash-attn",
        type=click.Choice(["auto", "off"]),
        help="off: the same logits in any batch, a little slower.  [default: auto]",
    ),
    click.option("--threads", type=click.INT, metavar="N", help="CPU threads.  [default: physical cores]"),
    click.option(
        "--gpu-layers",
        type=click.INT,
        metavar="N",
        help="Layers on the GPU; -1 is all.  [default: -1]",
    ),
)

sampling_options = _combined(
    click.option(
        "--max-tokens",
        type=click.INT,
        metavar="N",
        help="Stop after N tokens.  [default: window is full]",
    ),
    click.option(
        "--temperature",
        type=click.FLOAT,
        metavar="X",
        help="0 is greedy.  [default: the model's own, else 0.8]",
    ),
    click.option(
        "--top-p",
        type=click.FLOAT,
        metavar="X",
        help="Nucleus sampling.  [default: the model's own, else 0.95]",
    ),
    click.option(
        "--top-k",
        type=click.INT,
        metavar="N",
        help="Keep the N likeliest; 0 is all.  [default: the model's own, else 40]",
    ),
    click.option(
        "--min-p",
        type=click.FLOAT,
        metavar="X",
        help="Drop what is below X × the likeliest.  [default: the model's own, else 0.05]",
    ),
    click.option("--repeat-penalty", type=click.FLOAT, metavar="X", help="1 is none.  [default: 1]"),
    click.option(
        "--seed", type=click.INT, metavar="N", help="Of the draw.  [default: random; the answer names it]"
    ),
    click.option(
        "--stop", multiple=True, metavar="TEXT", help="End before this text; may be given several times."
    ),
    click.option("--ignore-eos", is_flag=True, help="Go on past the model's end-of-text token."),
    click.option(
        "--set",
        "assignments",
        multiple=True,
        callback=_assignments,
        metavar="KEY=VALUE",
        help="Any other sampling parameter, and logit_bias.TOKEN=VALUE, where TOKEN is an id "
        "or a text that is one token (-inf bans it).",
    ),
)

deadline_option = click.option(
    "--deadline",
    metavar="TIME",
    callback=duration,
    help="Stop after this time, say 20s or 5m, and keep what there is (exit 124); for a batch, each "
    "answer. Loading the model counts.",
)

overflow_option = click.option(
    "--on-overflow",
    type=click.Choice(OVERFLOW),
    default="error",
    show_default=True,
    help="A prompt over the window: refuse it (exit 67), cut text at its head, tail or middle, or leave out "
    "a conversation's oldest turns.",
)


def nice_option(default: str) -> Decorator[Any]:
    """`--nice N`, the priority of a request; `default` is named in the help."""
    return click.option(
        "--nice",
        type=click.IntRange(0, 19),
        metavar="N",
        help=f"From 0 (first) to 19 (last), who comes first where many share a model.  [default: {default}]",
    )


def configured(values: dict[str, Any]) -> Settings:
    """The settings in force, under the flags of `daemon_option`. Raises what `settings.load` raises."""
    from myllm import settings

    found = settings.load()
    return found._replace(daemon="never") if values["no_daemon"] else found


def as_text(streams: Streams, output: str) -> bool:
    """Whether stdout gets text, where `output` is auto, text or jsonl."""
    return streams.stdout_is_terminal if output == "auto" else output == "text"


def absolute(model: str) -> str:
    """A path to a model as any process understands it; names as they are."""
    from myllm.models.names import is_path

    return os.path.abspath(os.path.expanduser(model)) if is_path(model) else model  # noqa: PTH100, PTH111 — no pathlib on the warm path


def keep_alive_on_the_wire(seconds: float | None) -> float:
    """As a request says it: -1 is for ever."""
    return -1 if seconds is None else seconds


def model_part(model: str | None, configured: Settings, values: dict[str, Any]) -> dict[str, Any]:
    """The part of a request that says which model and how it is loaded. Raises UsageError.

    What is configured here is said: a daemon was started elsewhere, with other variables.
    """
    part: dict[str, Any] = {"model": absolute(model)} if model else {}
    if loading := load_options(values):
        part["options"] = loading
    if configured.offline:
        part["offline"] = True
    return part


def load_options(values: dict[str, Any]) -> dict[str, Any]:
    """The `options` object of a request, of what was given. Raises UsageError for a value out of range."""
    given = {name: values[name] for name in LOADING if values[name] is not None}
    if not given:
        return {}
    from myllm.requests import LoadOptions

    return LoadOptions.parse(given).to_wire()


def sampling_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling part of a request, of what was given. `--set` wins over an option of the same name.

    Raises UsageError for a value out of range.
    """
    given: dict[str, Any] = {
        name: checked_number(name, values[name], SAMPLING[name])
        for name in NAMED
        if values.get(name) is not None
    }
    given |= {name: values[name] for name in ("max_tokens", "seed") if values.get(name) is not None}
    if values["stop"]:
        given["stop"] = list(values["stop"])
    if values["ignore_eos"]:
        given["ignore_eos"] = True
    assigned: dict[str, Any] = values["assignments"]
    return given | assigned
