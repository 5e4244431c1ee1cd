"""Bars on stderr: when they are shown, and what is said where they are not."""

from __future__ import annotations

import io
import re
import time

import pytest

from myllm.cli.console import Streams
from myllm.cli.progress import Progress

PULL = {"pulling": {"model": "big\x1b", "bytes": 5_000_000, "total": 92_000_000}}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_pull_is_mentioned_once_and_nothing_else() -> None:
    err = io.StringIO()
    progress = Progress(Streams(stderr=err))
    for event in (PULL, PULL, {"loading": 0.5}):
        progress.preparing(event)
    progress.records(1)
    assert err.getvalue() == "myllm: pulling big\\x1b (92 MB); this is done once\n"


def test_a_terminal_gets_bars_that_make_way_for_notes() -> None:
    err = Terminal()
    streams = Streams(stderr=err)
    progress = Progress(streams)
    progress.preparing(PULL)
    assert "pulling big\\x1b" in err.getvalue()
    streams.note("hello")
    assert err.getvalue().endswith("\rmyllm: hello\n")
    progress.close()
    streams.note("again")
    assert err.getvalue().endswith("\rmyllm: again\n")


@pytest.mark.parametrize("wanted", [True, None])
def test_a_dumb_terminal_gets_bars_only_on_demand(
    wanted: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    err = Terminal()
    progress = Progress(Streams(stderr=err), wanted)
    progress.preparing({"loading": 0.5})
    progress.close()
    assert ("loading" in err.getvalue()) == bool(wanted)


def test_bars_can_be_refused_on_a_terminal() -> None:
    err = Terminal()
    Progress(Streams(stderr=err), wanted=False).preparing({"loading": 0.5})
    assert not err.getvalue()


def shown_of_texts(total: int | None) -> str:
    err = Terminal()
    progress = Progress(Streams(stderr=err), wanted=True)
    progress.texts(0, 0, total)
    time.sleep(0.15)  # tqdm draws ten times a second
    progress.texts(30, 1_000, total)
    time.sleep(0.15)
    progress.texts(60, 2_000, total)
    return err.getvalue().rpartition("\r")[2]


def test_of_a_file_s_texts_the_rate_and_the_time_left_are_shown() -> None:
    shown = re.fullmatch(
        r"texts: +50%\|.*\| 2\.00k/4\.00k \[00:00<00:00, .*B/s, (.*) texts/s\]", shown_of_texts(4_000)
    )
    assert shown
    assert 0 < float(shown[1]) <= 200


def test_of_a_pipe_s_texts_number_and_rate_are_shown() -> None:
    assert re.fullmatch(r"texts: 60 texts \[00:00, .* texts/s\]", shown_of_texts(None))
