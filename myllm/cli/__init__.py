"""The `myllm` command: global options and the table of its commands, each imported only when used.

Owns what `myllm --help` shows. Must not know what a command does; `COMMANDS` is all there is to it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, Final

import click

from myllm.cli.console import Streams

COMMANDS: Final[Mapping[str, str]] = {
    "chat": "Hold a conversation that is kept.",
    "embed": "Turn text into vectors.",
    "gen": "Generate text from a prompt, or from many.",
    "load": "Keep models warm in a daemon.",
    "models": "List, pull, add and remove models; no word lists them.",
    "serve": "Run the daemon in the foreground.",
    "sessions": "List, show, search and keep conversations; no word lists them.",
}
"""Command → its line in `myllm --help`. `myllm/cli/NAME.py` holds it, under that very name."""

EPILOG: Final = """\b
Examples:
  echo 'Why do Unix pipes matter?' | myllm gen
  cat report.txt | myllm gen 'Summarise this in one sentence.'
  myllm gen --batch < prompts.jsonl > answers.jsonl
  myllm models list
  myllm load smollm2

Environment: MYLLM_MODEL, MYLLM_OUTPUT, MYLLM_DAEMON, MYLLM_OFFLINE and MYLLM_DEBUG; see `man myllm`.
"""


class LazyGroup(click.Group):
    """A group that knows its commands' names and help lines, and imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = getattr(importlib.import_module(f"myllm.cli.{cmd_name}"), cmd_name)
        if not isinstance(command, click.Command):
            raise TypeError(f"myllm.cli.{cmd_name}.{cmd_name} is no command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        names = [name for name in self.list_commands(ctx) if name.startswith(incomplete)]
        options = click.Command.shell_complete(self, ctx, incomplete)
        return [*(CompletionItem(name, help=COMMANDS[name]) for name in names), *options]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, with the nearest names for one that there is not."""
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(COMMANDS))}"
            raise click.UsageError(f"no command {args[0]!r}: {hint}", ctx)
        return super().resolve_command(ctx, args)


def _show_version(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from myllm.cli.version import versions

        click.echo(versions())
        ctx.exit()


def _set_debug(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
    if wanted and isinstance(ctx.obj, Streams):
        ctx.obj.debug = True


@click.group(cls=LazyGroup, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the versions of MyLLM, llama-cpp-python and llama.cpp.",
)
@click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_set_debug,
    envvar="MYLLM_DEBUG",
    show_envvar=True,
    help="Show tracebacks of errors.",
)
def myllm() -> None:
    """Run language models on this machine: composable commands that read stdin and write JSONL."""
