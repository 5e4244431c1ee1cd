"""Kept sessions as transcripts, and transcripts onto stdout: flat in memory, and harmless on a terminal.

Owns reading a session as it is written out. Must not know formats, nor which session it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from myllm.cli.console import Streams, visible, visible_json
from myllm.errors import TryAgainError

if TYPE_CHECKING:
    from myllm.conversation import Message, Session
    from myllm.storage.session_store import SessionStore
    from myllm.transcripts.transcript import Transcript


class KeptMessages(Collection["Message"]):
    """A session's tree, read anew each time that it is gone through.

    After its length was asked for it has this length, though messages may be added meanwhile.
    """

    def __init__(self, store: SessionStore, session: str) -> None:
        self._store = store
        self._session = session
        self._length: int | None = None

    def __len__(self) -> int:
        if self._length is None:
            self._length = sum(1 for _ in self)
        return self._length

    def __iter__(self) -> Iterator[Message]:
        n_read = 0
        for message in islice(self._store.tree(self._session), self._length):
            n_read += 1
            yield message
        if self._length is not None and n_read < self._length:
            raise TryAgainError(f"session {self._session}: it was changed while it was read; try again")

    def __contains__(self, message: object) -> bool:
        return any(message == each for each in self)


def transcript_of(store: SessionStore, session: Session) -> Transcript:
    """All of a session, read as it is taken."""
    from myllm.transcripts.transcript import Transcript

    return Transcript(session, KeptMessages(store, session.id))


def write_text(streams: Streams, pieces: Iterable[str]) -> None:
    """Raw into a pipe; on a terminal control characters are escaped."""
    for piece in pieces:
        shown = visible(piece) if streams.stdout_is_terminal else piece
        streams.write(shown.encode("utf-8", "replace"))


def write_json(streams: Streams, pieces: Iterable[bytes]) -> None:
    """The same for JSON in whole lines or values."""
    for piece in pieces:
        streams.write(visible_json(piece) if streams.stdout_is_terminal else piece)


def write_records(streams: Streams, records: Iterable[dict[str, Any]]) -> None:
    """JSONL."""
    import orjson

    write_json(streams, (orjson.dumps(record) + b"\n" for record in records))
