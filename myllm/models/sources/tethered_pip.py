"""Runs pip until it ends or its parent does: what `pypi.py` starts as a child process.

Run as a script, not imported. Standard input is a pipe that the parent never writes to; its end
means that the parent is gone, also by `kill -9`, and that no one is left to clean up after pip.
"""

import os
import runpy
import threading


def _end_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: its lock, held here, would abort the interpreter's shutdown
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    runpy.run_module("pip", run_name="__main__", alter_sys=True)
