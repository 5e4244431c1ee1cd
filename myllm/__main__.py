"""The `myllm` program: runs the command line and turns how it ended into an exit status or a signal.

Knows no subcommand. Owns the manners at the end: one line on stderr for any error, death by the very
signal that was received, and no output lost without a word. Imports come late, so that a Ctrl-C which
comes early is met, too.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from myllm.cli.console import Streams

USAGE = 2
"""Exit status of a command line that makes no sense."""


def main() -> NoReturn:
    """Runs `sys.argv`; ends the process with the exit status that README.md documents, or by a signal."""
    try:
        _open_missing_streams()
        # OpenBLAS, which numpy brings, would start threads that keep a processor busy: 0.1 s of it a run.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        from myllm.cli.console import Streams

        streams = Streams()
        status = _run(streams)
        status = _flush(streams) or status
    except KeyboardInterrupt:
        _end_by("SIGINT")
    except BrokenPipeError:
        _end_by("SIGPIPE")
    _end(status)


def _run(streams: Streams) -> int:
    """The exit status; everything but signals is caught here."""
    import click

    from myllm.cli import myllm
    from myllm.errors import InternalError, IOFailureError, MyllmError

    try:
        if "_MYLLM_COMPLETE" in os.environ:
            myllm.main(prog_name="myllm")
        with myllm.make_context("myllm", sys.argv[1:], obj=streams) as context:
            return myllm.invoke(context) or 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        streams.note(_usage_line(error))
        return USAGE
    except click.Abort:
        raise KeyboardInterrupt from None
    except MyllmError as error:
        streams.report(error)
        return error.exit_status
    except BrokenPipeError:
        raise
    except OSError as error:
        failure = IOFailureError(f"I/O: {error.strerror or error}; the output is not complete")
        failure.__cause__ = error
        streams.report(failure)
        _forget_stdout()
        return failure.exit_status
    except Exception as error:  # noqa: BLE001 — whatever a bug is, the user gets one line
        bug = InternalError(f"unforeseen: {type(error).__name__}: {error}; --debug shows where")
        bug.__cause__ = error
        streams.report(bug)
        return bug.exit_status


def _usage_line(error: Exception) -> str:
    """click's complaint in MyLLM's form: what, why, and where to read on."""
    import click

    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return "no command given; see `myllm --help`"
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "myllm"
    text = error.format_message() if isinstance(error, click.ClickException) else str(error)
    said = " ".join(text.split()).rstrip(".")
    prefix = command.removeprefix("myllm").strip()
    return f"{prefix + ': ' if prefix else ''}{said[:1].lower() + said[1:]}; see `{command} --help`"


def _flush(streams: Streams) -> int:
    """Writes out what click printed. 0, or the exit status of what went wrong; raises BrokenPipeError."""
    from myllm.cli.console import write_failure

    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        streams.report(failure := write_failure(error))
        _forget_stdout()
        return failure.exit_status
    return 0


def _forget_stdout() -> None:
    """Lets Python's own flush at exit go nowhere, so that it does not complain a second time."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _end(status: int) -> NoReturn:
    """Ends the process without taking the interpreter to pieces: 5 ms that nobody needs.

    stdout is flushed, models end with the connections to them, and what threads still do is nobody's.
    """
    with suppress(OSError, ValueError):
        sys.stderr.flush()
    os._exit(status)


def _end_by(name: str) -> NoReturn:
    """Dies by the signal itself, so that shells stop their loops; nothing is printed."""
    import signal  # 3 ms that nobody pays who is not interrupted

    number = signal.Signals[name]
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # only where the signal is blocked


def _open_missing_streams() -> None:
    """Puts something on descriptors 0–2 that are closed, so that no socket of ours takes their place.

    stdout is opened for reading, so that writing to it is the error that it should be.
    """
    for fd, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 — lives as long as the process
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 — likewise


if __name__ == "__main__":
    main()
