"""In which order answers go out: that of their input, or as they end. Pure; tickets count from 0."""

from __future__ import annotations

from typing import Protocol


class Ordering(Protocol):
    """Takes pieces of answers as they come and gives back what may be written."""

    def add(self, ticket: int, piece: bytes, *, last: bool) -> tuple[bytes, list[int]]:
        """What to write now, and the tickets whose answers are whole with it."""


class AsTheyEnd:
    """Whatever comes goes out at once."""

    def add(self, ticket: int, piece: bytes, *, last: bool) -> tuple[bytes, list[int]]:
        return piece, [ticket] if last else []


class InOrder:
    """Only the oldest answer goes out; pieces of later ones wait for their turn."""

    def __init__(self) -> None:
        self._turn = 0
        self._waiting: dict[int, list[bytes]] = {}
        self._whole: set[int] = set()

    def add(self, ticket: int, piece: bytes, *, last: bool) -> tuple[bytes, list[int]]:
        if last:
            self._whole.add(ticket)
        if ticket != self._turn:
            self._waiting.setdefault(ticket, []).append(piece)
            return b"", []
        pieces, ended = [piece], []
        while self._turn in self._whole:
            self._whole.remove(self._turn)
            ended.append(self._turn)
            self._turn += 1
            pieces += self._waiting.pop(self._turn, [])
        return b"".join(pieces), ended
