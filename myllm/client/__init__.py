"""What a command does to reach a Runtime: the daemon's where one answers, else one of its own on a thread.

`connect` is what commands use. Must not know click, nor import anything slow before a worker has
been started.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from myllm.client.client import Client
    from myllm.settings import Settings


def connect(
    settings: Settings, note: Callable[[str], None] = lambda text: None, *, spare: bool = True
) -> Client:
    """A client of the daemon, if one answers, else of a Runtime of this command's own.

    `note` takes what the user should know. Without `spare` a worker of one's own is started only when
    one is needed. Raises UnavailableError where no worker can be started, or no daemon answers and
    `settings.daemon` is `always`.
    """
    if settings.daemon != "never" and (client := _daemon(note)):
        return client
    if settings.daemon == "always":
        from myllm.errors import UnavailableError

        raise UnavailableError("daemon: none answers; start one with `myllm load MODEL`")
    from myllm.spawning import spawn

    worker = spawn() if spare else None  # first, so that its imports run beside ours
    from myllm.client.cold import run_cold

    return run_cold(settings, worker)


def _daemon(note: Callable[[str], None]) -> Client | None:
    """A client of the daemon, if one of this version answers."""
    from myllm import __version__
    from myllm.client.dial import dial_daemon
    from myllm.errors import TryAgainError

    try:
        client = dial_daemon()
    except TryAgainError as error:
        note(f"{error}; running without it")
        return None
    if client is None or client.greeting.get("version") == __version__:
        return client
    note(
        f"the daemon is MyLLM {client.greeting.get('version')}, this is {__version__}: running without it; "
        "`myllm load` replaces it"
    )
    client.close()
    return None
