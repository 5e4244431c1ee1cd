"""A chat template: messages in, spans of text out, rendered in a child process with limits.

Owns the renderer child (`renderer.py`): its start, its wall-clock limit, its death and its
replacement; and what is done to messages before they are rendered (roles a template does not know,
text that looks like control tokens). Knows no tokenizer, engine or model file.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

import orjson

from myllm.errors import BadDataError, InternalError
from myllm.prompts.spans import SpecialTexts, guard, split

RENDERER: Final = Path(__file__).with_name("renderer.py")
ENVIRONMENT: Final = (
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "PATH",
    "PYTHONHOME",
    "PYTHONPATH",
    "TZ",
    "VIRTUAL_ENV",
)
"""What the child sees of the environment: what Python needs to start, and no tokens or keys."""
NEXT_STEP: Final = "use --raw, or another file of this model"

GIVEN: Final = ("content", "name")
"""What the user writes of a message; its role is one of a few."""

ALTERNATE: Final = re.compile("alternat", re.IGNORECASE)
"""What the templates that want a user's and an assistant's message in turns all say when they get others."""

Message = dict[str, str]


class AlternationError(BadDataError):
    """The template refuses these messages because their roles do not alternate."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one rendering may take: CPU and wall seconds; bytes of memory and output on top of the input's.

    The wall limit is only for a child that hangs without working, so it is generous.
    """

    cpu_s: float = 1.0
    wall_s: float = 10.0
    memory_bytes: int = 64 * 1024 * 1024
    output_bytes: int = 1024 * 1024


class ChatTemplate:
    """One template, and the child process that renders it. Used by one thread at a time.

    The child starts with the object and is not waited for; one that a template has wrecked is
    replaced at the next rendering.
    """

    def __init__(self, source: str, limits: Limits | None = None) -> None:
        self._source = source
        self._limits = limits or Limits()
        self._special_texts: tuple[Sequence[str], SpecialTexts] = ((), SpecialTexts(()))
        self._takes_system: bool | None = None
        self._child: _Child | None = _Child(source, self._limits)

    def render(
        self, messages: list[Message], *, special_tokens: Sequence[str] = (), bos: str = "", eos: str = ""
    ) -> list[str]:
        """The prompt up to where the answer begins, as spans of text; tokens must not join across spans.

        No text of `special_tokens` that lies in a message, wholly or in part, is whole in any span.
        Joined, the spans are what the template makes of the messages. Raises BadDataError where the
        template refuses the messages, fails, or passes a limit, and of these AlternationError.
        """
        messages = self._with_known_roles(messages, bos, eos)
        if self._special_texts[0] is not special_tokens:
            self._special_texts = (special_tokens, SpecialTexts(special_tokens))
        given = [(i, key) for i, message in enumerate(messages) for key in GIVEN if key in message]
        texts, sentinel = guard([messages[i][key] for i, key in given], self._special_texts[1], self._source)
        guarded = [dict(message) for message in messages]
        for (i, key), text in zip(given, texts, strict=True):
            guarded[i][key] = text
        return split(self._render(guarded, bos, eos), sentinel)

    def close(self) -> None:
        """Ends the child; the object can be used again, and starts a new one."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _with_known_roles(self, messages: list[Message], bos: str, eos: str) -> list[Message]:
        """The messages as this template can take them, by the rules of llama.cpp (common/chat.cpp).

        `developer` is `system` by another name except for gpt-oss, which has both; a template that
        refuses or ignores a system message gets its text at the head of the first user message.
        """
        if "<|channel|>" not in self._source:
            messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
        if messages[0]["role"] != "system":
            return messages
        if self._takes_system is None:
            self._takes_system = self._probe_system_role(bos, eos)
        return messages if self._takes_system else _system_folded(messages)

    def _probe_system_role(self, bos: str, eos: str) -> bool:
        probe = [{"role": "system", "content": "probe-system"}, {"role": "user", "content": "probe-user"}]
        try:
            return "probe-system" in self._render(probe, bos, eos)
        except BadDataError:
            if self._child is None:
                raise  # it did not refuse, it ran away
            return False

    def _render(self, messages: list[Message], bos: str, eos: str) -> str:
        request = {
            "messages": messages,
            "bos_token": bos,
            "eos_token": eos,
            "add_generation_prompt": True,
        }
        if self._child is None:
            self._child = _Child(self._source, self._limits)
        try:
            return self._child.render(request)
        except _EndedError as error:
            self.close()
            raise error.reason from None


def _system_folded(messages: list[Message]) -> list[Message]:
    system, *rest = messages
    if rest and rest[0]["role"] == "user":
        return [{**rest[0], "content": f"{system['content']}\n{rest[0]['content']}"}, *rest[1:]]
    return [{**system, "role": "user"}, *rest]


class _EndedError(Exception):
    """The child is gone or must go; `reason` is what the user is told."""

    def __init__(self, reason: BadDataError | InternalError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Child:
    """The renderer process and the lines to and from it."""

    def __init__(self, source: str, limits: Limits) -> None:
        self._limits = limits
        arguments = (limits.cpu_s, limits.memory_bytes, limits.output_bytes)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(RENDERER), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
        )
        self._compiled = False
        # Compiling runs beside the model's loading. A source over a pipe's 64 KiB waits here for the child.
        self._write({"template": source})

    def render(self, variables: dict[str, Any]) -> str:
        """What the template makes of the variables. Raises BadDataError, or _EndedError with the reason."""
        watchdog = threading.Timer(self._limits.wall_s, self._process.kill)
        watchdog.start()
        try:
            if not self._compiled:
                self._read()
                self._compiled = True
            self._write(variables)
            return self._read()
        finally:
            watchdog.cancel()

    def kill(self) -> None:
        """Ends the process and waits for its end."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):  # what was still to be written to a dead child
                    pipe.close()

    def _write(self, request: dict[str, Any]) -> None:
        try:
            line = orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE)
        except TypeError as error:
            raise BadDataError(f"prompt: not text that UTF-8 can carry: {error}") from error
        with suppress(OSError):  # the child is gone; the reply that does not come says why
            self._stream(self._process.stdin).write(line)
            self._stream(self._process.stdin).flush()

    def _read(self) -> str:
        line = self._stream(self._process.stdout).readline()
        if not line.endswith(b"\n"):
            raise _EndedError(self._last_words())
        reply = orjson.loads(line)
        if "text" in reply:
            return str(reply["text"])
        raise _failure(reply["error"], _printable(reply["message"]), self._limits)

    def _last_words(self) -> BadDataError | InternalError:
        self._process.kill()
        status = self._process.wait()
        if status == -signal.SIGPROF:
            return _stopped(f"took longer than {self._limits.cpu_s:g} s")
        if status == -signal.SIGKILL:
            return _stopped(f"gave no answer in {self._limits.wall_s:g} s, or the system killed it")
        if status < 0:
            return _stopped(f"crashed its process ({signal.Signals(-status).name})")
        return InternalError(f"chat template: its renderer ended with status {status}; {NEXT_STEP}")

    @staticmethod
    def _stream(pipe: IO[bytes] | None) -> IO[bytes]:
        if pipe is None:
            raise InternalError("chat template: its renderer has no pipe")
        return pipe


def _failure(kind: str, message: str, limits: Limits) -> Exception:
    if kind == "refused":
        error = AlternationError if ALTERNATE.search(message) else BadDataError
        return error(f"chat template: refuses these messages: {message}; change them, or use --raw")
    if kind == "memory":
        room = f"{limits.memory_bytes // 2**20} MiB of memory or {limits.output_bytes // 2**20} MiB of text"
        return _EndedError(_stopped(f"took more than {room} beyond its input"))
    if kind == "recursion":
        return _EndedError(_stopped("nests too deeply"))
    return BadDataError(f"chat template: {message}; {NEXT_STEP}")


def _stopped(why: str) -> BadDataError:
    return BadDataError(f"chat template: {why}; {NEXT_STEP}")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
