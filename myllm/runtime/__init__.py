"""Between a command and its models: client, Runtime, worker processes.

`connect` is what commands use. Must not know click, nor import anything slow before a worker has
been started.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from myllm.runtime.client import Client
    from myllm.settings import Settings


def connect(settings: Settings, *, spare: bool = True) -> Client:
    """A client of a Runtime of this command's own. Raises UnavailableError where no worker can be started.

    Without `spare` a worker is started only when one is needed.
    """
    from myllm.runtime.spawn import spawn

    worker = spawn() if spare else None  # first, so that its imports run beside ours
    from myllm.runtime.cold import run_cold

    return run_cold(settings, worker)
