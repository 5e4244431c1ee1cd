"""Man pages and shell completions, made from the click definitions: `python -m myllm.cli.docs`.

Owns their form. What they say is said once, in the commands' own help, in the table of settings and
here under EXIT STATUS and FILES. A test holds that what is committed is what this makes.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

from myllm import settings
from myllm.cli import COMMANDS, myllm

EXIT_STATUS: Final = (
    ("0", "Answered, also where the answer was cut at --max-tokens or at the end of the window."),
    ("1", "Some records of a batch failed, or the MyLLM command whose output was read; nothing was found."),
    ("2", "The command line makes no sense."),
    ("65", "Bad data: a file, a hash, text that is not UTF-8."),
    ("66", "No such model, session or file, or the model is not loaded."),
    ("67", "The prompt does not fit the context window; nothing was generated."),
    ("69", "The daemon or the process that ran the model died, or cannot be had."),
    ("70", "Anything unforeseen; --debug shows where."),
    ("73", "A file or folder cannot be created."),
    ("74", "Input or output failed, say a full disk."),
    ("75", "Try again: something is locked or full, or the daemon is ending."),
    ("77", "Permission denied."),
    ("78", "The configuration has an unknown key or a bad value."),
    ("124", "The deadline passed; what there was until then has been printed."),
    ("130, 141, 143", "Ended by SIGINT, SIGPIPE or SIGTERM itself, so that loops of the shell end, too."),
)
"""How the commands there are can end; README has the same table, and a test compares them."""
FILES: Final = (
    ("$XDG_CONFIG_HOME/myllm/config.toml", "Configuration; by default ~/.config/myllm/config.toml."),
    ("$XDG_DATA_HOME/myllm", "Pulled models and their names; by default ~/.local/share/myllm."),
    ("$XDG_CACHE_HOME/myllm", "What can be deleted and made again; by default ~/.cache/myllm."),
    (
        "$XDG_RUNTIME_DIR/myllm/daemon.sock",
        "Where the daemon listens; without that variable ~/.local/state/myllm/run/daemon.sock.",
    ),
    ("$XDG_STATE_HOME/myllm/sessions.sqlite", "Conversations; by default in ~/.local/state/myllm."),
    (
        "$XDG_STATE_HOME/myllm/daemon.log",
        "What the daemon did, as JSON lines without prompts and answers; by default ~/.local/state/myllm.",
    ),
)
RECORDS: Final = (
    "With --batch and --map every line of stdin that is not blank is a record. If the first is a whole "
    "JSON object, all are JSON, else each line is a text; --input says otherwise. The text of a JSON record "
    "is the first of text, prompt, content, full_text and input, or what --field names, or its messages, a "
    "list of objects with role and content. In the output of a MyLLM command the records are its last "
    "lines, their text is full_text, and an error line stays an error.",
    "With --batch a record may carry parameters, which win over the flags: the sampling parameters, "
    "max_tokens, seed, stop, ignore_eos, logprobs, logit_bias, system, raw, on_overflow and deadline_ms.",
    "The answer is one line: index, the record's own keys, then done, full_text, model, finish_reason, "
    "usage, timings and seed, or error with code and message, and input_hash, 16 hexadecimal digits of the "
    "line's SHA-256. MyLLM's keys win over keys of the record of the same name; model, done, usage, "
    "timings, finish_reason, session_id and error of the record are dropped. A line that is no record, or "
    "is longer than 16 MiB, becomes an error record. As text the answers are printed one after the other, "
    "each ending in one newline, and errors go to stderr.",
    "The exit status is 1 if any record failed or was cut off by the deadline. Where nothing at all could "
    "be done, for a reason that is not a record's own, it is that reason's, say 66 or 69.",
    "--resume FILE reads the records that an earlier run left in FILE and answers only the others: those "
    "that are missing, those that failed, and those whose line has changed. They go to stdout as always, "
    "so that one command, run until it exits with 0, does the whole: myllm gen --batch --resume out.jsonl < "
    "in.jsonl >> out.jsonl. If stdout is FILE itself, the torn last line of a run that was killed is taken "
    "away first. Where FILE has several records of one index, the last counts.",
)
"""What the page of gen says under RECORDS, beyond the help."""
SHELLS: Final[dict[str, type[ShellComplete]]] = {
    "myllm.bash": BashComplete,
    "_myllm": ZshComplete,
    "myllm.fish": FishComplete,
}


def main(folder: str = ".") -> None:
    """Writes `man/` and `completions/` below `folder`."""
    for name, text in documents():
        (Path(folder) / name).write_text(text)


def documents() -> Iterator[tuple[str, str]]:
    """Every generated file: its path in the repository and its text."""
    root = click.Context(myllm, info_name="myllm", **myllm.context_settings)
    yield "man/myllm.1", man_page(myllm, root, tuple(f"myllm-{name}" for name in sorted(COMMANDS)))
    for name in sorted(COMMANDS):
        command = myllm.get_command(root, name)
        if command is not None:
            context = click.Context(command, info_name=name, parent=root)
            yield f"man/myllm-{name}.1", man_page(command, context, ("myllm",))
    for file, shell in SHELLS.items():
        yield f"completions/{file}", completion(shell)


def completion(shell: type[ShellComplete]) -> str:
    """The shell's completion script, which asks `myllm` itself what could follow."""
    return shell.source_template % shell(myllm, {}, "myllm", "_MYLLM_COMPLETE").source_vars() + "\n"


def man_page(command: click.Command, context: click.Context, see_also: tuple[str, ...]) -> str:
    """A page of section 1 in the man macros."""
    name = context.command_path.replace(" ", "-")
    summary = COMMANDS.get(str(context.info_name), command.help or "").rstrip(".")
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [
        f'.TH "{name.upper()}" 1 "" "MyLLM" "User Commands"',
        f".SH NAME\n{_escaped(name)} \\- {_escaped(summary[:1].lower() + summary[1:])}",
        f".SH SYNOPSIS\n.B {_escaped(context.command_path)}\n{_escaped(usage)}",
        f".SH DESCRIPTION\n{_prose(command.help or '')}",
        f".SH OPTIONS\n{_options(command, context)}",
    ]
    if isinstance(command, click.Group):
        parts.append(f".SH COMMANDS\n{_commands(command, context)}")
    if name == "myllm-gen":
        parts.append(".SH RECORDS\n" + "\n.PP\n".join(map(_escaped, RECORDS)))
    parts += _epilog(command.epilog or "")
    parts += [
        ".SH EXIT STATUS\n" + _list(EXIT_STATUS),
        ".SH ENVIRONMENT\nA flag wins over a variable, a variable over config.toml.\n"
        + _list(_environment()),
        ".SH FILES\n" + _list(FILES),
        ".SH SEE ALSO\n"
        + ",\n".join(f".BR {_escaped(page)} (1)" for page in see_also).replace(",\n", " ,\n"),
    ]
    return "\n".join(parts) + "\n"


def _options(command: click.Command, context: click.Context) -> str:
    options = [param for param in command.get_params(context) if isinstance(param, click.Option)]
    return _list([record for option in options if (record := option.get_help_record(context))])


def _commands(group: click.Group, context: click.Context) -> str:
    """The commands of a group; those that have no page of their own with their options."""
    parts = []
    for name in group.list_commands(context):
        if group is myllm:
            parts.append(_list([(name, f"{COMMANDS[name]} See myllm-{name}(1).")]))
            continue
        command = group.get_command(context, name)
        if command is None:
            continue
        inner = click.Context(command, info_name=name, parent=context)
        usage = " ".join(command.collect_usage_pieces(inner))
        parts.append(
            f".SS {_escaped(f'{name} {usage}')}\n{_prose(command.help or '')}\n{_options(command, inner)}"
        )
    return "\n".join(parts)


def _environment() -> list[tuple[str, str]]:
    table = [
        (setting.variable, f"{setting.help[:1].upper()}{setting.help[1:]}. In config.toml: {setting.key}.")
        for setting in settings.TABLE
    ]
    return [*table, ("MYLLM_DEBUG", "1 shows tracebacks of errors, like --debug.")]


def _epilog(text: str) -> list[str]:
    """Sections of an epilog's blocks, `Title:` and lines below; other blocks are the page's own."""
    blocks = re.findall(r"^(Examples):\n((?:  .*\n?)+)", text, re.MULTILINE)
    return [f".SH {title.upper()}\n.nf\n{_escaped(body.rstrip())}\n.fi" for title, body in blocks]


def _list(entries: list[tuple[str, str]] | tuple[tuple[str, str], ...]) -> str:
    return "\n".join(
        f".TP\n.B {_escaped(term)}\n{_escaped(' '.join(text.split()))}" for term, text in entries
    )


def _prose(text: str) -> str:
    return "\n.PP\n".join(_escaped(" ".join(block.split())) for block in _plain(text).split("\n\n"))


def _plain(text: str) -> str:
    """Help text without click's marks, paragraphs apart."""
    lines = [line.strip() for line in text.replace("\b\n", "").strip().splitlines()]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    """Text for roff: backslashes, minus signs, what is not ASCII, and lines that look like requests."""
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    escaped = "".join(c if c.isascii() else f"\\[u{ord(c):04X}]" for c in escaped)
    return re.sub(r"^([.'])", r"\\&\1", escaped, flags=re.MULTILINE)


if __name__ == "__main__":
    main(*sys.argv[1:])
