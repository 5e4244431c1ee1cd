"""`myllm serve`: the daemon in the foreground, for service managers and for who wants to watch it.

Owns its options. Must not know how it serves.
"""

from __future__ import annotations

import click

from myllm.cli.console import Streams
from myllm.errors import UsageError

EPILOG = """\b
Examples:
  myllm serve --no-http
  myllm serve --no-http 2>> serve.log &

\b
Exit status: 0 stopped by SIGTERM; 2 usage; 73 cannot create the
socket; 75 another daemon runs; 77 permission; 78 configuration. See `man myllm`.
"""


@click.command("serve", epilog=EPILOG, short_help="Run the daemon in the foreground.")
@click.option("--no-http", is_flag=True, help="Serve commands on this machine only; required for now.")
@click.pass_obj
def serve(streams: Streams, /, no_http: bool) -> int:
    """Run the daemon in the foreground, with its log as JSON lines on stderr.

    It stays until it is stopped: SIGTERM lets what runs finish within 30 seconds and refuses what is
    new, a second one ends at once. SIGHUP reads the configuration again. A service manager may pass the
    socket (LISTEN_FDS) and is told when it is ready, and that it lives (NOTIFY_SOCKET, WATCHDOG_USEC).
    """
    if not no_http:
        raise UsageError("serve: HTTP is not part of this version; give --no-http")
    from myllm import settings
    from myllm.daemon.daemon import run
    from myllm.logs import open_log

    return run(settings.load(), open_log(None), kind="serve", ready=lambda: None)
