"""Python imports this at the start of each process that has this folder on its path: notes which of MyLLM's
files its calls pass, and writes them where MYLLM_WALK says when the process ends.
"""

import os
import sys
import threading
from pathlib import Path
from types import FrameType

PACKAGE = f"{os.sep}myllm{os.sep}"
IN_A_FUNCTION = 1
"""CO_OPTIMIZED: bodies of modules and classes, which run on import, have no such flag."""


def install(folder: str) -> None:
    calls: dict[int, list[str]] = {}
    end = os._exit

    def profile(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_flags & IN_A_FUNCTION and PACKAGE in code.co_filename:
            file = code.co_filename.rpartition(PACKAGE)[2]
            passed = calls.setdefault(threading.get_ident(), [])
            if not passed or passed[-1] != file:
                passed.append(file)

    def tell(status: int) -> None:
        sys.setprofile(None)
        threading.setprofile(None)
        words = " ".join(sys.orig_argv)
        kind = next((word for word in ("worker.main", "daemon.daemon") if word in words), "command")
        lines = [" ".join(files) for files in list(calls.values())]
        whole = Path(folder, f".{os.getpid()}")
        whole.write_text("\n".join(lines))
        whole.rename(Path(folder, f"{kind}.{os.getpid()}"))
        end(status)

    os._exit = tell
    threading.setprofile(profile)
    sys.setprofile(profile)


if folder := os.environ.get("MYLLM_WALK"):
    install(folder)
