"""A Runtime's connection against clients that break the rules: a clear error, and nothing else breaks."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from myllm.protocol import MAX_LINE, encode, hello
from myllm.requests import Request, Wanted
from myllm.runtime.connection import serve_connection
from myllm.runtime.fleet import Fleet
from myllm.runtime.keeper import Keeper
from myllm.runtime.runtime import Runtime
from myllm.settings import load

Event = dict[str, Any]
FakeModel = Callable[..., Path]
HELLO = encode(hello("test"))


class Server:
    """A Runtime on a thread that serves any number of socketpairs, as the daemon will."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._runtime = Runtime(load(), Keeper(Fleet(), keep_alive=None))
        self._served: list[Any] = []

    def connect(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.settimeout(20)

        async def serve() -> None:
            await serve_connection(self._runtime, *await asyncio.open_connection(sock=theirs))

        self._served.append(asyncio.run_coroutine_threadsafe(serve(), self._loop))
        return ours

    def close(self) -> None:
        """Ends it all; raises what a connection raised."""
        for served in self._served:
            served.result(10)
        asyncio.run_coroutine_threadsafe(self._runtime.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def talk(server: Server, *sent: bytes) -> list[Event]:
    """Sends all, says no more, and returns the events up to the connection's end, the hello left out."""
    with server.connect() as connection:
        received = b""
        with suppress(ConnectionError):  # it had enough, and did not read the rest
            for data in sent:
                connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):  # the end, after all that was written, where it left something unread
            while data := connection.recv(65536):
                received += data
    first, *events = map(orjson.loads, received.splitlines())
    assert first["hello"]["max_in_flight"] == 64
    return events


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        ([b'{"op":"status"}\n'], "bad_data"),
        ([b"GET / HTTP/1.1\r\n\r\n"], "bad_data"),
        ([encode({"hello": {"protocol": 99}})], "unavailable"),
        ([encode({"hello": 1})], "bad_data"),
        ([HELLO, b"nonsense\n"], "bad_data"),
        ([HELLO, b"[1]\n"], "bad_data"),
        ([HELLO, b'{"part":5}\n'], "bad_data"),
        ([HELLO, b'{"op":"gen","id":"x"}\n'], "usage"),
        ([HELLO, b'{"op":"gen","id":true}\n'], "usage"),
        ([HELLO, b'{"op":"gen","id":-1}\n'], "usage"),
        ([HELLO, b'{"op":"gen","id":' + b"9" * 30 + b"}\n"], "usage"),
        ([HELLO, b"x" * (MAX_LINE + 2)], "bad_data"),
    ],
)
def test_what_makes_the_stream_unusable_gets_one_error_and_the_end(
    server: Server, sent: list[bytes], code: str
) -> None:
    (event,) = talk(server, *sent)
    assert (event["done"], event["error"]["code"]) == (True, code)


@pytest.mark.parametrize("op", ["fly", None, 7, ["gen"]])
def test_an_unknown_operation_is_refused_and_the_connection_lives(server: Server, op: object) -> None:
    refused, status = talk(server, HELLO, encode({"op": op, "id": 1}), encode({"op": "status", "id": 2}))
    assert (refused["id"], refused["error"]["code"]) == (1, "usage")
    assert (status["id"], status["done"]) == (2, True)


def test_a_bug_while_a_request_is_parsed_fails_that_request_alone(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(message: Event) -> Request:
        if message["op"] == "gen":
            raise ZeroDivisionError("a bug")
        return Request(message["op"], Wanted())

    monkeypatch.setattr("myllm.runtime.runtime.Request.parse", parse)
    failed, status = talk(server, HELLO, encode({"op": "gen", "id": 1}), encode({"op": "status", "id": 2}))
    assert (failed["id"], failed["error"]["code"]) == (1, "internal")
    assert (status["id"], status["done"]) == (2, True)


def test_an_id_used_twice_at_once_ends_the_connection(server: Server, fake_model: FakeModel) -> None:
    request = encode({"op": "gen", "id": 1, "model": str(fake_model(load_ms=5000)), "prompt": "x"})
    (event,) = (e for e in talk(server, HELLO, request, request) if "error" in e)
    assert event["error"]["code"] == "usage"


def test_a_request_without_id_must_be_alone(server: Server, fake_model: FakeModel) -> None:
    request = {"op": "gen", "model": str(fake_model(load_ms=5000)), "prompt": "x"}
    (event,) = (e for e in talk(server, HELLO, encode(request), encode({**request, "id": 1})) if "error" in e)
    assert event["error"]["code"] == "usage"


def test_clients_share_a_worker_and_each_gets_its_own_answer(
    server: Server, fake_model: FakeModel, nothing_left: list[int]
) -> None:
    model = str(fake_model(ms_per_token=2))
    connections = [server.connect() for _ in range(4)]
    for number, connection in enumerate(connections):
        prompt = f"client {number} speaks"
        connection.sendall(HELLO + encode({"op": "gen", "id": 5, "model": model, "prompt": prompt}))
    for number, connection in enumerate(connections):
        with connection, connection.makefile("rb") as lines:
            done = next(event for line in lines if (event := orjson.loads(line)).get("done"))
        assert (done["id"], done["full_text"]) == (5, f"client {number} speaks")
    assert len(nothing_left) == 1


def test_a_client_that_leaves_ends_its_requests(server: Server, fake_model: FakeModel) -> None:
    """With room for one request at a time, the next client is answered only because the first one's ended."""
    model = str(fake_model(tokens=["x"], ms_per_token=1, parallel=1, window=2**20))
    endless = {"op": "gen", "id": 1, "model": model, "prompt": "a", "ignore_eos": True}
    with server.connect() as connection, connection.makefile("rb") as lines:
        connection.sendall(HELLO + encode(endless))
        while b"token" not in next(lines):
            pass
    with server.connect() as connection, connection.makefile("rb") as lines:
        connection.sendall(HELLO + encode({**endless, "max_tokens": 3}))
        done = next(event for line in lines if (event := orjson.loads(line)).get("done"))
    assert done["full_text"] == "xxx"


MESSAGES = st.fixed_dictionaries(
    {},
    optional={
        "op": st.sampled_from(["gen", "count", "cancel", "status", "load", "hello", ""]),
        "id": st.integers(-1, 3) | st.none() | st.text(max_size=2),
        "prompt": st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.integers(-9, 2**63),
        "model": st.sampled_from(["no-such-model", "/nowhere.gguf", 5]),
        "hello": st.none(),
        "part": st.sampled_from(["{", "}", 1]),
        "more": st.booleans(),
        "deadline_ms": st.integers(-1, 50),
    },
)
NOISE = st.lists(st.binary(max_size=40) | MESSAGES.map(encode), max_size=6)


@given(NOISE, st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_input_breaks_more_than_its_own_connection(
    server: Server, noise: list[bytes], greets: bool
) -> None:
    talk(server, *([HELLO] if greets else []), *noise)
    (status,) = talk(server, HELLO, encode({"op": "status"}))
    assert status["done"] is True


def test_a_client_that_goes_frees_what_it_asked_at_once(fake_model: FakeModel) -> None:
    async def run() -> None:
        runtime = Runtime(load(), Keeper(Fleet(), keep_alive=None))
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=theirs)
        serving = asyncio.create_task(serve_connection(runtime, reader, writer))
        request = {
            "op": "gen",
            "id": 1,
            "model": str(fake_model(ms_per_token=50, tokens=["a"] * 99)),
            "prompt": "x",
        }
        ours.sendall(HELLO + encode(request))
        asked: list[weakref.ref[Any]] = []
        while not asked:
            asked = [weakref.ref(call) for call in runtime._calls if call._carrier]
            await asyncio.sleep(0.01)
        gc.collect()
        gc.disable()
        try:
            ours.close()
            await serving
            del reader, writer, serving
            async with asyncio.timeout(20):  # the worker's last event of it is still under way
                while asked[0]() is not None:
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()
            await runtime.close()

    asyncio.run(run())
