"""`python -m tests.bench.session_store`: what calls of the session store take, and how that grows.

Figures are in ms of one call each, on a store of 1,000,000 messages in 10,000 sessions and on one of
10,000 messages; the p95 of those that are judged is to be at most 50 ms. Run it by hand on a machine that
does nothing else; it takes some minutes and 2 GB in `--work`, most of which is for filling the store.
"""

from __future__ import annotations

import argparse
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Final

from myllm.conversation import Message, Session
from myllm.storage.sessions import SQLiteSessions, sessions_file

CALLS: Final = 200
PER_SESSION: Final = 100
TARGET_MS: Final = 50.0
JUDGED: Final = ("first page of the list", "load last 50", "append", "search")
"""What the target is for: calls whose names begin so; the others are for information."""
WORDS: Final = 60
"""A message's, about 400 characters."""
SEED: Final = 7
VOCABULARY: Final = 20_000
RARE: Final = 0.01
"""The part of messages that hold each of the words searched for."""
N_RARE: Final = 20


def messages(source: random.Random, common: list[str]) -> list[Message]:
    """One session's, its words spread as in a language: by rank, the frequent few times the rare."""
    made = []
    for n in range(PER_SESSION):
        words = [common[int(len(common) * source.random() ** 4)] for _ in range(WORDS)]
        words += [f"rare{r}" for r in range(N_RARE) if source.random() < RARE]
        made.append(
            Message(
                id=f"m{n}",
                parent=f"m{n - 1}" if n else None,
                role=("user", "assistant")[n % 2],
                content=" ".join(words),
                created=n,
                tokens={"0123456789abcdef": 90},
                answer={"model": "smollm2", "finish_reason": "stop"} if n % 2 else {},
            )
        )
    return made


def vocabulary(source: random.Random) -> list[str]:
    """The most frequent first."""
    return [f"{source.randbytes(source.randint(1, 4)).hex()}{n}" for n in range(VOCABULARY)]


def filled(store: SQLiteSessions, n_messages: int) -> None:
    """By imports: each session in one transaction."""
    source = random.Random(SEED)
    common = vocabulary(source)
    n_sessions = n_messages // PER_SESSION
    began = time.time() - n_sessions * 3600
    for n in range(n_sessions):
        at = began + n * 3600  # an hour each, or ids would all be of this one
        tree = [_at(message, at) for message in messages(source, common)]
        session = Session(
            id="s", name=f"session {n}", created=at, updated=at, head=tree[-1].id, directory=f"/d{n % 50}"
        )
        store.import_session(session, tree)
        if n % 500 == 499:
            print(f"bench: {n + 1:,} of {n_sessions:,} sessions", file=sys.stderr)


def _at(message: Message, began: float) -> Message:
    return replace(message, created=began + 30 * message.created)


def milliseconds(call: Callable[[int], object]) -> list[float]:
    """Of each of `CALLS` calls, given its number."""
    taken = []
    for n in range(CALLS):
        began = time.perf_counter()
        call(n)
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def measured(store: SQLiteSessions, n_sessions: int) -> Iterator[tuple[str, list[float]]]:
    """What a call is, and what it takes; each call has an argument of its own where it can."""
    source = random.Random(8)
    names = [f"session {source.randrange(n_sessions)}" for _ in range(CALLS)]
    ids = [store.find(name).id for name in names]
    frequent = vocabulary(random.Random(SEED))[0]
    yield "first page of the list", milliseconds(lambda n: store.page())
    yield "first page of a directory", milliseconds(lambda n: store.page(directory=f"/d{n % 50}"))
    yield "last of a directory", milliseconds(lambda n: store.last(directory=f"/d{n % 60}"))
    yield "find by name", milliseconds(lambda n: store.find(names[n]))
    yield "load last 50", milliseconds(lambda n: store.path(ids[n], 50))
    yield "append", milliseconds(lambda n: store.append(ids[n], "user", f"rare{n % N_RARE} word {n} " * 20))
    yield "search 1 word, 1 %", milliseconds(lambda n: store.search(f"rare{n % N_RARE}"))
    yield (
        "search 2 words, 0.01 %",
        milliseconds(lambda n: store.search(f"rare{n % N_RARE} rare{(n + 1) % N_RARE}")),
    )
    yield (
        "search 1 word, 1 %, best first",
        milliseconds(lambda n: store.search(f"rare{n % N_RARE}", order="best")),
    )
    yield (
        "search 1 word, 1 %, nobody's",
        milliseconds(lambda n: store.search(f"rare{n % N_RARE}", owner="nobody")),
    )
    yield "search a word of nearly all", milliseconds(lambda n: store.search(frequent))
    yield "fork", milliseconds(lambda n: store.fork(ids[n]))
    session, tree = store.find(ids[0]), list(store.tree(ids[0]))
    anew = replace(session, id="", name=None)
    imported: list[Session] = []
    yield "import 100 messages", milliseconds(lambda n: imported.append(store.import_session(anew, tree)))
    yield "remove a session of 100", milliseconds(lambda n: store.remove(imported[n].id))


def figures(work: Path, n_messages: int) -> dict[str, list[float]]:
    """Of a store in `work`, filled unless one of this size is there from before."""
    folder = work / f"{n_messages}"
    if not sessions_file(folder).exists():
        with closing(SQLiteSessions(folder)) as store:
            filled(store, n_messages)
    with closing(sqlite3.connect(sessions_file(folder))) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = sessions_file(folder).stat().st_size
    print(f"bench: {n_messages:,} messages are {size / 1e6:,.0f} MB", file=sys.stderr)
    with closing(SQLiteSessions(folder)) as store:
        return dict(measured(store, n_messages // PER_SESSION))


def main() -> None:
    parser = argparse.ArgumentParser(description="What calls of the session store take.")
    parser.add_argument("--messages", type=int, nargs=2, default=(10_000, 1_000_000), metavar=("FEW", "MANY"))
    parser.add_argument("--work", type=Path, help="keep the stores here, and use those that are there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        few, many = (figures(arguments.work or Path(temporary), n) for n in arguments.messages)
    n_few, n_many = arguments.messages
    print(
        f"| call | {n_few:,} messages: median, p95 (ms) | {n_many:,}: median, p95 (ms) | growth "
        f"of the median | p95 ≤ {TARGET_MS:g} ms |"
    )
    print("| --- | --- | --- | --- | --- |")
    for name, taken in many.items():
        growth = median(taken) / median(few[name])
        met = ("met" if _p95(taken) <= TARGET_MS else "MISSED") if name.startswith(JUDGED) else ""
        print(f"| {name} | {_pair(few[name])} | {_pair(taken)} | × {growth:.2g} | {met} |")


def _p95(taken: list[float]) -> float:
    return quantiles(taken, n=20)[-1]


def _pair(taken: list[float]) -> str:
    return f"{median(taken):.2f}, {_p95(taken):.2f}"


if __name__ == "__main__":
    main()
