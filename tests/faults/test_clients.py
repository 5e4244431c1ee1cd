"""Clients that vanish, do not read, are too many, idle or talk nonsense: nobody else ever notices."""

from __future__ import annotations

import os
import resource
import selectors
import signal
import socket
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myllm.protocol import MAX_IN_FLIGHT, MAX_LINE, MessageReader, encode

from .conftest import Launch
from .rig import HELLO, WAIT, Daemon, Event, descriptors, gen, numbered, received, text_of, times, until

FakeModel = Callable[..., Path]
MEGABYTE = 2**20

# ── gone ────────────────────────────────────────────────────────────────────────────────────


def sees(connection: socket.socket, *words: bytes) -> None:
    """Reads until all these words have come."""
    seen = b""
    while not all(word in seen for word in words):
        data = connection.recv(65536)
        assert data
        seen += data


class Gone:
    """Ways to leave. Each returns when its client is gone."""

    def __init__(self, daemon: Daemon, fake_model: FakeModel) -> None:
        self._daemon = daemon
        self._slow = fake_model("slow", tokens=["x"], ms_per_token=2, window=100_000, parallel=1)
        self._wide = fake_model(
            "wide", tokens=["y" * 500], ms_per_token=1, window=100_000, prompt_ms_per_token=1
        )
        self._cold = fake_model("cold", load_ms=10_000)
        for model in (self._slow, self._wide):
            daemon.done({"op": "load", "model": str(model)})
        self.ways = (self.while_decoding, self.while_queued, self.in_prefill, self.unread, self.in_a_batch)

    def _asking(self, *requests: Event) -> socket.socket:
        connection = self._daemon.raw()
        connection.sendall(HELLO + b"".join(map(encode, requests)))
        return connection

    def while_decoding(self) -> None:
        with self._asking(gen(self._slow, ignore_eos=True)) as connection:
            sees(connection, b'"token"')

    def while_queued(self) -> None:
        with self._asking(gen(self._slow, ignore_eos=True)) as first:
            sees(first, b'"token"')
            with self._asking(gen(self._slow, ignore_eos=True)) as second:
                sees(second, b"hello")
                until(lambda: self._daemon.models()["slow"]["waiting"] == 1)
            until(lambda: self._daemon.models()["slow"]["waiting"] == 0, 1)
            sees(first, b'"token"')

    def in_prefill(self) -> None:
        with self._asking(gen(self._wide, "word " * 300, ignore_eos=True)) as connection:
            sees(connection, b"hello")
            time.sleep(0.05)

    def unread(self) -> None:
        with self._asking(gen(self._wide, ignore_eos=True)) as connection:
            sees(connection, b'"token"')
            time.sleep(0.1)

    def in_a_batch(self) -> None:
        requests = [gen(self._slow, max_tokens=100, ignore_eos=True, id=n) for n in range(5 * MAX_IN_FLIGHT)]
        with self._asking(*requests) as connection:
            sees(connection, b'"done":true')

    def while_loading(self) -> None:
        with self._asking(gen(self._cold)) as connection:
            sees(connection, b"loading")


WARMED = """
import signal, sys
signal.signal(signal.SIGUSR2, lambda *_: [None for n in range(30_000) if sys.intern(f"{n} passes")])
"""
"""CPython's table of interned strings is made anew after so many that came and went: half a megabyte, once,
after some 250 clients by itself."""


@times(20, 500)
def test_decoding_stops_within_a_second_when_its_client_is_gone(
    launch: Launch, fake_model: FakeModel, count: int
) -> None:
    daemon = launch(WARMED)
    gone = Gone(daemon, fake_model)
    before = open_files = 0
    for turn in range(count):
        gone.ways[turn % len(gone.ways)]()
        until(daemon.is_quiet, 1)
        if turn == min(50, count // 2):  # warm
            daemon.signal(signal.SIGUSR2)
            until(daemon.is_quiet, 1)
            before, open_files = daemon.memory(), len(descriptors(daemon.pid))
    until(lambda: len(descriptors(daemon.pid)) <= open_files)
    if count >= 100:  # or the first growth of Python's heap is most of it
        assert daemon.memory() <= 1.05 * before


def test_a_load_that_nobody_waits_for_any_more_is_given_up(daemon: Daemon, fake_model: FakeModel) -> None:
    Gone(daemon, fake_model).while_loading()
    until(lambda: "cold" not in daemon.models(), 1)
    until(lambda: len(daemon.workers) == 2, 1)


# ── not reading ─────────────────────────────────────────────────────────────────────────────


def test_a_client_that_does_not_read_is_waited_for_and_nobody_else_is(
    daemon: Daemon, fake_model: FakeModel
) -> None:
    tokens = [f" {number}" + "x" * 7000 for number in range(2000)]  # 14 MB
    model = fake_model(tokens=tokens, ms_per_token=1)
    daemon.done(gen(model, max_tokens=1))
    before = daemon.memory()
    with daemon.raw() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.sendall(HELLO + encode(gen(model)))
        until(lambda: daemon.models()["model"]["busy"] == 1)
        until(lambda: daemon.models()["model"]["busy"] == 0)  # paused, long before its end
        assert daemon.memory() - before < 8 * MEGABYTE
        began = time.monotonic()
        other = daemon.done(gen(model, max_tokens=200))
        assert other["usage"]["completion_tokens"] == 200
        assert other["timings"]["tokens_per_second"] > 0.8 * 200 / (time.monotonic() - began)
        assert daemon.memory() - before < 8 * MEGABYTE
        hello, *events = [event for event in _until_done(slow) if "loading" not in event]
    assert "hello" in hello
    assert [event["token"] for event in events[:-1]] == tokens
    assert events[-1]["finish_reason"] == "stop"


def _until_done(connection: socket.socket) -> list[Event]:
    events: list[Event] = []
    reader = MessageReader()
    while not events or not events[-1].get("done"):
        events.extend(reader.feed(connection.recv(65536)))
    return events


def test_a_client_that_asks_and_asks_but_does_not_read_is_not_heard_any_more(daemon: Daemon) -> None:
    before = daemon.memory()
    with daemon.raw() as client:
        client.setblocking(False)
        client.send(HELLO)
        number, unsent = 0, b""
        began = heard = time.monotonic()
        while time.monotonic() - heard < 1:
            unsent = unsent or b"".join(b'{"op":"status","id":%d}\n' % (number + each) for each in range(100))
            try:
                unsent = unsent[client.send(unsent) :]
            except BlockingIOError:
                time.sleep(0.01)
            else:
                number, heard = number + 100, time.monotonic()
            assert heard - began < 30
        assert daemon.memory() - before < 8 * MEGABYTE
        client.settimeout(WAIT)
        answered = 0
        for event in received(client):
            answered += bool(event.get("done"))
            if answered == 1000:
                break
    assert daemon.status()


# ── too many ────────────────────────────────────────────────────────────────────────────────


def test_ten_times_too_many_are_refused_at_once_and_the_others_served(
    launch: Launch, fake_model: FakeModel
) -> None:
    daemon = launch(MYLLM_QUEUE="16")
    model = fake_model(tokens=numbered(50), ms_per_token=40)
    daemon.done({"op": "load", "model": str(model)})
    ended: dict[int, tuple[float, Event]] = {}
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        clients = [stack.enter_context(daemon.raw()) for _ in range(160)]
        readers = [MessageReader() for _ in clients]
        for number, client in enumerate(clients):
            client.sendall(HELLO)
            selector.register(client, selectors.EVENT_READ, number)
        sent = []
        for client in clients:
            sent.append(time.monotonic())
            client.sendall(encode(gen(model)))
        while len(ended) < len(clients):
            for key, _ in selector.select(WAIT):
                for event in readers[key.data].feed(clients[key.data].recv(65536)):
                    if event.get("done"):
                        ended[key.data] = time.monotonic() - sent[key.data], event
    refused = [took for took, event in ended.values() if event.get("error", {}).get("code") == "try_again"]
    served = [event for _, event in ended.values() if event.get("full_text") == "".join(numbered(50))]
    assert len(served) == 16
    assert len(refused) == 144
    assert statistics.median(refused) <= 0.05


def test_a_connection_with_many_requests_is_never_refused(launch: Launch, fake_model: FakeModel) -> None:
    daemon = launch(MYLLM_QUEUE="16")
    model = fake_model(tokens=numbered(3), ms_per_token=1)
    with ExitStack() as stack:
        clients = [stack.enter_context(daemon.client()) for _ in range(3)]
        for client in clients:
            for number in range(100):
                client.send(gen(model, id=number))
        for client in clients:
            events, left = client.events(), 100
            while left:
                if (event := orjson.loads(next(events))).get("done"):
                    assert event["full_text"] == " 0 1 2"
                    left -= 1


def test_a_lone_request_finds_a_place_beside_many(launch: Launch, fake_model: FakeModel) -> None:
    daemon = launch(MYLLM_QUEUE="16")
    model = fake_model(tokens=numbered(100), ms_per_token=2, parallel=100)
    with daemon.client() as many:
        for number in range(100):
            many.send(gen(model, id=number))
        assert b"done" in next(line for line in many.events() if b'"done":true' in line)
        assert daemon.done(gen(model, max_tokens=1))["full_text"] == " 0"


# ── idle ────────────────────────────────────────────────────────────────────────────────────


@times(200, 1000)
def test_idle_connections_cost_little(daemon: Daemon, count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        before = daemon.memory()
        with ExitStack() as stack:
            for _ in range(count):
                idle = stack.enter_context(daemon.raw())
                idle.sendall(HELLO[:9])  # and no more
                assert b"hello" in idle.recv(65536)
            took = []
            for _ in range(20):
                began = time.monotonic()
                assert daemon.status()["daemon"]["connections"] == count + 1
                took.append(time.monotonic() - began)
            assert max(took) < 2  # the benchmark holds it to 0.1 s, where nothing else runs
            assert daemon.memory() - before < 50 * MEGABYTE
        until(lambda: daemon.status()["daemon"]["connections"] == 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ── hostile lines ───────────────────────────────────────────────────────────────────────────

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just("id"), inner, max_size=4)
    ),
    max_leaves=12,
)
names = st.sampled_from(["gen", "count", "embed", "unload", "cancel", "status", "fly", "models"])
keys = st.sampled_from(
    ["id", "model", "prompt", "messages", "options", "stop", "texts", "seed", "part", "more", "deadline_ms"]
)
requests = st.builds(
    lambda op, rest: {**rest, "op": op, "model": rest.get("model", "no-such-model")},
    names | values,
    st.dictionaries(keys, values, max_size=5),
)
lines = st.binary(max_size=200) | (values | requests).map(lambda value: _line(value))


def _line(value: object) -> bytes:
    """A value as JSON, also where JSON has no word for it."""
    import json

    return json.dumps(value, default=str).encode("utf-8", "surrogatepass")


@pytest.mark.parametrize(
    "few_or_many", [60, pytest.param(5000, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_no_line_brings_the_daemon_down(launch: Launch, fake_model: FakeModel, few_or_many: int) -> None:
    daemon = launch()
    model = fake_model(tokens=numbered(3))
    daemon.done(gen(model))

    @settings(
        max_examples=few_or_many,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(greet=st.booleans(), sent=st.lists(lines, min_size=1, max_size=5))
    def attack(greet: bool, sent: list[bytes]) -> None:
        # What is no JSON at the end, so that the daemon always has reason to close the connection.
        events = daemon.talk(HELLO * greet, *(line + b"\n" for line in sent), b"no more\n")
        assert events
        error = events[-1]["error"]
        assert error["code"] in {"bad_data", "usage", "unavailable"}
        assert "Traceback" not in error["message"]
        assert all(event["error"]["code"] != "internal" for event in events if "error" in event)

    attack()
    assert daemon.lives
    assert text_of(daemon.ask(gen(model))) == " 0 1 2"
    assert not [entry for entry in daemon.log() if entry["event"] in ("unforeseen", "crashed")]


def test_a_line_over_the_limit_is_refused_and_not_kept(daemon: Daemon) -> None:
    before = daemon.memory()
    (event,) = daemon.talk(HELLO, b"x" * (MAX_LINE + 1))
    assert event["error"]["code"] == "bad_data"
    assert daemon.memory() - before < 40 * MEGABYTE


def test_a_client_of_another_protocol_is_told_so(daemon: Daemon) -> None:
    (event,) = daemon.talk(b'{"hello":{"protocol":99,"version":"9"}}\n')
    assert event["error"]["code"] == "unavailable"
    assert "protocol 99" in event["error"]["message"]


def test_the_socket_is_the_owners_alone(daemon: Daemon) -> None:
    status = os.lstat(daemon.path)
    assert status.st_mode & 0o777 == 0o600
    assert os.lstat(Path(daemon.path).parent).st_mode & 0o777 == 0o700
    with daemon.raw() as connection:
        connection.shutdown(socket.SHUT_WR)
        assert [list(event) for event in received(connection)] == [["hello"]]
