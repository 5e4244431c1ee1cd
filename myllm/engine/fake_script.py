"""What a fake model says and how it fails: a JSON file named `*.fake.json`.

Read wherever a model's file is asked about. Must not know the engine that plays it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from dataclasses import dataclass, fields
from pathlib import Path

import orjson

from myllm.errors import BadDataError, NotFoundError

CONTENTS_ONLY = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""The default chat template: nothing but the contents, so that an echo is exactly what was asked."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when: after `after_tokens` tokens of the `request`-th request, or `at` "load",
    or `at` "vector", after as many vectors of all requests together.

    Kinds: `kill`, `segv` and `abort` are signals, `exit` is status 3, `hang` never returns, `error`
    is a foreign exception. `request` counts from 1; None means whichever comes first. `words` go to
    stderr just before.
    """

    kind: str
    at: str = "token"
    after_tokens: int = 0
    request: int | None = None
    words: str = ""

    def strike(self) -> None:
        """Lets it happen; returns for no kind, and raises RuntimeError for `error`."""
        if self.words:
            sys.stderr.write(self.words + "\n")
            sys.stderr.flush()
        if number := {"kill": signal.SIGKILL, "segv": signal.SIGSEGV, "abort": signal.SIGABRT}.get(self.kind):
            os.kill(os.getpid(), number)
        if self.kind == "exit":
            os._exit(3)
        if self.kind == "error":
            raise RuntimeError("scripted fault")
        threading.Event().wait()


@dataclass(frozen=True, slots=True)
class Script:
    """The keys of a `*.fake.json`.

    `tokens` are the pieces of every answer, which then stops; without them the answer repeats the
    prompt token by token. A text's vector has `dimensions` numbers and depends on its words alone.
    Paces are in ms; all running requests advance by one token a step, and beside them some windows
    of the texts to embed. `memory_bytes` are taken as long as the model is loaded.
    """

    tokens: list[str] | None = None
    prompt_ms_per_token: float = 0
    ms_per_token: float = 0
    load_ms: float = 0
    memory_bytes: int = 0
    window: int = 4096
    dimensions: int = 8
    parallel: int = 64
    template: str | None = CONTENTS_ONLY
    add_bos: bool = False
    fault: Fault | None = None

    @classmethod
    def read(cls, path: Path) -> Script:
        """The script at `path`. Raises NotFoundError, or BadDataError for anything but a script."""
        try:
            values = orjson.loads(path.read_bytes())
            if not isinstance(values, dict):
                raise ValueError("not a JSON object")
            if unknown := set(values) - {f.name for f in fields(cls)}:
                raise ValueError(f"unknown keys {', '.join(sorted(unknown))}")
            if fault := values.get("fault"):
                values["fault"] = Fault(**fault)
            return cls(**values)
        except FileNotFoundError as error:
            raise NotFoundError(f"{path}: no such file") from error
        except (OSError, ValueError, TypeError) as error:
            raise BadDataError(f"{path}: not a fake model: {error}") from error
