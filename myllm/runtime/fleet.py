"""Which loaded models stay and which must go: memory, keep-alive, pins, crashes. The policy, no effects.

Owns the books on loaded models, one object each. Pure: moments are given in seconds of one monotonic clock,
memory in bytes. Must not know processes, event loops or files, and leaves a member's backend, work and end
to `keeper.py`, which does what is decided here.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from myllm.errors import UnavailableError
from myllm.requests import LoadOptions

if TYPE_CHECKING:
    import asyncio

    from myllm.runtime.backend import Backend
    from myllm.runtime.single_flight import SingleFlight

CRASHES: Final = 3
CRASH_WINDOW: Final = 60.0
"""`CRASHES` within so many seconds, and a model is refused for as long: its file or options are to blame, and
loading it again and again would take the machine along."""


class State(Enum):
    """Where a member is in its life; each follows the one before."""

    ASKED = "asked"
    """It takes no memory yet, and others need not count it."""
    LOADING = "loading"
    READY = "ready"
    ENDING = "ending"
    """It is being ended: its memory is about to come free."""


@dataclass(eq=False, slots=True)
class Member:
    """A model that is loaded or about to be; `estimate` is what its load was expected to take."""

    name: str
    path: Path
    options: LoadOptions
    estimate: int
    keep_alive: float | None
    """Seconds it stays without work; None is for ever."""
    used: float
    """When it last had work."""
    pinned: bool = False
    busy: bool = True
    """Whether it has work, its own load too."""
    state: State = State.ASKED
    leaving: str | None = None
    """Why it is to go as soon as it has no work; nobody new gets it."""
    backend: Backend | None = None
    """What answers for it, from the moment it loads."""
    work: SingleFlight[Backend] = field(init=False)
    """Its load, which all who ask for it join."""
    end: asyncio.Task[None] | None = None
    """Its end, once that is under way."""

    @property
    def expires(self) -> float | None:
        """When its keep-alive ends; None where it stays, or while it has work."""
        if self.leaving and not self.busy:
            return self.used
        return None if self.busy or self.pinned or self.keep_alive is None else self.used + self.keep_alive


@dataclass(frozen=True, slots=True)
class Room:
    """What is to be done before a load: `evict` these; `wait` for those, which have work, to go after it."""

    evict: tuple[Member, ...] = ()
    wait: tuple[Member, ...] = ()


@dataclass(slots=True)
class Fleet:
    """The members, and the limits they live under: bytes of all together, and how many."""

    max_memory: int | None = None
    max_loaded: int | None = None
    members: list[Member] = field(default_factory=list)
    _crashes: dict[Path, deque[float]] = field(default_factory=dict)

    def find(self, path: Path, options: LoadOptions) -> Member | None:
        """The member that serves a request with these options; what a request does not ask for may be
        anything. One loaded with exactly these comes first, then the one with the largest window.
        """
        asked = options.to_wire().items()
        fitting = [
            member
            for member in self.members
            if member.path == path and not member.leaving and asked <= member.options.to_wire().items()
        ]

        def fitness(member: Member) -> tuple[bool, float, float]:
            return member.options == options, member.options.context or math.inf, member.used

        return max(fitting, key=fitness, default=None)

    def room(self, newcomer: Member, available: int) -> Room:
        """How the newcomer gets its place with `available` bytes free on the machine.

        Others without pin go, those without work first, of these the least recently used, and no more than
        needed. Raises UnavailableError where even all of those that may go would not make room.
        """
        others = [
            member for member in self.members if member.state is not State.ASKED and member is not newcomer
        ]
        missing = self._missing(newcomer, others, available)
        surplus = 0 if self.max_loaded is None else len(others) + 1 - self.max_loaded
        chosen: list[Member] = []
        for member in _may_go(others):
            if missing <= 0 and surplus <= 0:
                break
            chosen.append(member)
            missing -= member.estimate
            surplus -= 1
        if missing > 0 or surplus > 0:
            raise UnavailableError(self._refusal(newcomer, others, available))
        idle, busy = (tuple(member for member in chosen if member.busy is busy) for busy in (False, True))
        return Room(idle, busy)

    def expired(self, now: float) -> list[Member]:
        """Members whose time is over."""
        return [m for m in self.members if m.expires is not None and m.expires <= now]

    def next_expiry(self) -> float | None:
        """The moment at which `expired` next has something to say, as far as is known now."""
        return min((m.expires for m in self.members if m.expires is not None), default=None)

    def crashed(self, path: Path, now: float) -> None:
        """A worker with this model died."""
        self._crashes.setdefault(path, deque(maxlen=CRASHES)).append(now)

    def check_crashes(self, name: str, path: Path, now: float) -> None:
        """Raises UnavailableError for a model that crashed too often lately."""
        crashes = self._crashes.get(path, deque())
        if len(crashes) < CRASHES or crashes[-1] - crashes[0] > CRASH_WINDOW:
            return
        if (left := crashes[-1] + CRASH_WINDOW - now) > 0:
            raise UnavailableError(
                f"{name}: its worker died {CRASHES} times within {CRASH_WINDOW:.0f} s; it is not loaded for "
                f"another {left:.0f} s; see the log, or run it with --no-daemon"
            )

    def _missing(self, newcomer: Member, others: list[Member], available: int) -> int:
        """Bytes that must come free; none, where it is 0 or less."""
        promised = sum(member.estimate for member in others if member.state is State.LOADING)
        missing = newcomer.estimate + promised - available
        if self.max_memory is not None:
            loaded = sum(member.estimate for member in others)
            missing = max(missing, newcomer.estimate + loaded - self.max_memory)
        return missing

    def _refusal(self, newcomer: Member, others: list[Member], available: int) -> str:
        stay = [member.name for member in others if not _may_leave(member)]
        kept = f", and {', '.join(stay)} must stay" if stay else ""
        if self.max_loaded is not None and len(stay) >= self.max_loaded:
            return f"{newcomer.name}: models.max_loaded is {self.max_loaded}{kept}; unload one"
        limit = "" if self.max_memory is None else f", models.max_memory is {_megabytes(self.max_memory)}"
        return (
            f"{newcomer.name}: it takes about {_megabytes(newcomer.estimate)}, {_megabytes(available)} are "
            f"free{limit}{kept}; give a smaller --context, or unload a model"
        )


def _may_go(members: Iterable[Member]) -> list[Member]:
    """Those without work first, then those that load, each kind by their last use."""
    return sorted(filter(_may_leave, members), key=lambda m: (m.busy, m.state is State.LOADING, m.used))


def _may_leave(member: Member) -> bool:
    return not member.pinned or member.leaving is not None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
