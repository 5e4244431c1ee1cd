"""The child process that renders chat templates: a sandbox with limits, reading and writing JSON lines.

A template comes with a model and is hostile input: it may loop, eat memory or crash the
interpreter. Here it takes only this process with it. Run by path (`python -P renderer.py CPU_S
MEMORY_BYTES OUTPUT_BYTES`), so it must import nothing of MyLLM; its other side is `chat_template.py`.

The first line in is `{"template": source}`, each further one the variables of a rendering
(`messages`, `bos_token`, …). Each is answered by `{"text": …}` or `{"error": KIND, "message": …}`.
End of input ends the process. CPU time is limited by the kernel, which kills the process also
inside one long C call; after any other exhausted limit it ends by itself.
"""

from __future__ import annotations

import codecs
import json
import pprint  # noqa: F401 - as jinja2.debug
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import jinja2.debug  # noqa: F401 - jinja2 imports it when it needs it, and then no file can be opened any more
from jinja2 import ChainableUndefined, Template, Undefined, UndefinedError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_PER_INPUT_BYTE = 24
"""Room for the input beside the limit: its line, its text (4 bytes a character), what is rendered of it."""
OUTPUT_PER_INPUT_BYTE = 4
MESSAGE_CHARS = 300
NOT_GIVEN = {"tools": None, "documents": None}
"""What transformers passes to every template, and we have none of; llama.cpp then passes nothing."""


class RefusedError(Exception):
    """The template itself called `raise_exception`."""


class GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}`, Hugging Face's mark of training data: passed through.

    As there a block of its own: what is set in it is not set behind it.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it as a plain class attribute

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_passed_through"), [], [], body).set_lineno(line)

    def _passed_through(self, caller: Callable[[], str]) -> str:
        return caller()


class Lenient(ChainableUndefined):
    """What is not there, as llama.cpp has it (common/jinja/runtime.cpp): no more is all that would be in it,
    and added to a text it is an empty one.
    """

    def __add__(self, other: Any) -> Any:
        return other

    __radd__ = __add__


def environment(undefined: type[Undefined] = Undefined) -> ImmutableSandboxedEnvironment:
    """The environment that templates are written for (transformers, utils/chat_template_utils.py)."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[LoopControlExtension, GenerationTag],
        undefined=undefined,
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = _strftime_now
    return env


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: object) -> None:
    raise RefusedError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


class Sandbox:
    """One template and what compiling or rendering it may take; limits in seconds and bytes.

    It renders as transformers does; where that fails on something that is not there, as llama.cpp does.
    """

    def __init__(self, cpu_s: float, memory_bytes: int, output_bytes: int) -> None:
        self._cpu_s = cpu_s
        self._memory_bytes = _address_space_bytes() + memory_bytes
        self._output_bytes = output_bytes
        self._source = ""
        self._lenient: Template | None = None
        self._template = environment().from_string("")

    def compile(self, request: dict[str, Any], size: int) -> str:
        """Takes `request["template"]` as the template from now on; renders nothing."""
        self._source = request["template"]
        self._template = environment().from_string(self._source)
        return ""

    def render(self, request: dict[str, Any], size: int) -> str:
        """The template with the request's variables. Raises MemoryError past `output_bytes`."""
        room = self._output_bytes + OUTPUT_PER_INPUT_BYTE * size
        try:
            return "".join(_pieces(self._template, NOT_GIVEN | request, room))
        except (UndefinedError, TypeError):  # the latter of tools that are none
            self._lenient = self._lenient or environment(Lenient).from_string(self._source)
            return "".join(_pieces(self._lenient, request, room))

    def answer(self, line: bytes, action: Callable[[dict[str, Any], int], str]) -> tuple[bytes, bool]:
        """The reply line to a request line, and whether the process is still sound after it."""
        _limit_memory(self._memory_bytes + MEMORY_PER_INPUT_BYTE * len(line))
        signal.setitimer(signal.ITIMER_PROF, self._cpu_s)
        try:
            return _line({"text": action(json.loads(line), len(line))}), True
        except RefusedError as error:
            return _failure("refused", str(error)), True
        except (MemoryError, OverflowError):
            return _failure("memory", ""), False
        except RecursionError:
            return _failure("recursion", ""), False
        except Exception as error:  # noqa: BLE001 - whatever a template manages to raise is its error
            return _failure("failed", f"{type(error).__name__}: {error}"), True
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _pieces(template: Template, variables: dict[str, Any], room: int) -> Iterator[str]:
    for piece in template.generate(variables):
        room -= len(piece)
        if room < 0:
            raise MemoryError
        yield piece


def _failure(kind: str, message: str) -> bytes:
    _limit_memory(None)
    return _line({"error": kind, "message": message[:MESSAGE_CHARS].encode(errors="replace").decode()})


def _line(reply: dict[str, str]) -> bytes:
    return json.dumps(reply, ensure_ascii=False).encode() + b"\n"


def _limit_memory(limit_bytes: int | None) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    with suppress(ValueError, OSError):  # macOS knows the limit and refuses to set it
        resource.setrlimit(resource.RLIMIT_AS, (hard if limit_bytes is None else limit_bytes, hard))


def _address_space_bytes() -> int:
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[0]) * resource.getpagesize()
    return 512 * 1024 * 1024  # macOS, where the limit does not hold anyway


def _close_off() -> None:
    """From here on no file can be opened or written, whatever gets out of the sandbox."""
    time.localtime()  # reads the time zone's file, for strftime_now
    codecs.lookup("unicode-escape")  # a module of its own, for jinja2's string literals
    for limit, value in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 3)):
        resource.setrlimit(limit, (value, value))
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> None:
    """Answers the lines of stdin until it ends, or until one leaves the process unsound."""
    cpu_s, memory_bytes, output_bytes = sys.argv[1:]
    sandbox = Sandbox(float(cpu_s), int(memory_bytes), int(output_bytes))
    _close_off()
    requests: IO[bytes] = sys.stdin.buffer
    action = sandbox.compile
    for line in iter(requests.readline, b""):
        reply, sound = sandbox.answer(line, action)
        sys.stdout.buffer.write(reply)
        sys.stdout.buffer.flush()
        if not sound:
            return
        action = sandbox.render


if __name__ == "__main__":
    main()
