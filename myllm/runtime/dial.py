"""A connection to the daemon, where one answers. On the way of every command: nothing slow is imported."""

from __future__ import annotations

from typing import Final

from myllm.errors import UnavailableError
from myllm.runtime.client import Client
from myllm.runtime.socket_file import dial, socket_path

PATIENCE: Final = 5.0
"""Seconds that the daemon has to greet: less would be rash on a machine that computes on all cores."""


def dial_daemon() -> Client | None:
    """A client that the daemon has greeted, of whatever version it is; None where nobody listens.

    Raises PermissionDeniedError where what is there is not ours, TryAgainError where it does not speak.
    """
    connection = dial(socket_path(), PATIENCE)
    if connection is None:
        return None
    connection.settimeout(PATIENCE)
    client = Client(connection)
    try:
        _ = client.greeting
    except UnavailableError:
        client.close()
        return None  # it was just ending
    except BaseException:
        client.close()
        raise
    connection.settimeout(None)
    return client
