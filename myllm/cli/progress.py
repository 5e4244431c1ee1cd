"""Bars on stderr: a model being pulled or loaded, records being answered, texts being embedded.

Owns when a bar is shown: on a terminal, or with `--progress`; never on stdout. tqdm is imported when
the first one is drawn. Must not know requests or records.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from myllm.cli.console import Streams, visible

if TYPE_CHECKING:
    from tqdm import tqdm


class Progress:
    """The bar that is shown at the moment, if any. `wanted` None means: if stderr is a terminal."""

    def __init__(self, streams: Streams, wanted: bool | None = None) -> None:
        self._streams = streams
        by_itself = streams.stderr_is_terminal and os.environ.get("TERM") != "dumb"
        self._shown = by_itself if wanted is None else wanted
        self._counts = wanted or (self._shown and not streams.stdout_is_terminal)
        self._said = False
        self._bar: tqdm[Any] | None = None
        self._what = ""

    def preparing(self, event: dict[str, Any]) -> None:
        """A `loading` or `pulling` event. Where no bar is shown, a pull is at least mentioned once."""
        if pulling := event.get("pulling"):
            self._pulling(str(pulling.get("model")), int(pulling.get("bytes") or 0), pulling.get("total"))
        elif "loading" in event and self._shown:
            self._advance(
                "loading the model",
                float(event["loading"]),
                1.0,
                bar_format="{desc}: {percentage:3.0f}%|{bar}|",
            )

    def bytes(self, what: str, done: int, total: int | None) -> None:
        """How much of a file has been read or copied."""
        if self._shown:
            self._advance(visible(what), done, total, unit="B", unit_scale=True)

    def records(self, done: int) -> None:
        """How many records have been answered; by itself not where they are printed on a terminal, too."""
        if not self._counts:
            self.close()
        else:
            self._advance("records", done, None, unit=" records")

    def texts(self, n_texts: int, n_bytes: int, total: int | None) -> None:
        """How many texts have been embedded; where the input's `total` bytes are known, a bar of these."""
        if not self._counts:
            self.close()
        elif total is None:
            self._advance("texts", n_texts, None, unit=" texts")
        else:
            bar = self._advance("texts", n_bytes, total, unit="B", unit_scale=True)
            if n_texts and (seconds := bar.format_dict["elapsed"]):
                bar.set_postfix_str(f"{n_texts / seconds:,.1f} texts/s", refresh=False)

    def close(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            self._streams.before_note = lambda: None

    def _pulling(self, model: str, done: int, total: int | None) -> None:
        if self._shown:
            self._advance(f"pulling {visible(model)}", done, total, unit="B", unit_scale=True)
        elif not self._said:
            size = f" ({total / 1e6:,.0f} MB)" if total else ""
            self._streams.note(f"pulling {model}{size}; this is done once")
            self._said = True

    def _advance(self, what: str, done: float, total: float | None, **look: Any) -> tqdm[Any]:
        if self._bar is None or self._what != what:
            from tqdm import tqdm

            self.close()
            self._what = what
            self._bar = tqdm(desc=what, total=total, leave=False, file=self._streams.stderr, **look)
            self._streams.before_note = self._bar.clear
        self._bar.total = total
        self._bar.update(done - self._bar.n)
        return self._bar
