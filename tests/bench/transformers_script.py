"""sentence-transformers, kept alive: run by its own Python, with a checkpoint's folder and how many threads.

Prints `ready`; then a line on stdin is a command, `{"texts":[…],"batch_size":32}`, and its answer is
`{"seconds":1.5,"vectors":1000}`.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from sentence_transformers import SentenceTransformer


def main() -> None:
    """Loads the model on the CPU and answers until stdin ends."""
    folder, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    model = SentenceTransformer(folder, device="cpu")
    print("ready", flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        started = time.monotonic()
        vectors = model.encode(command["texts"], batch_size=command["batch_size"], show_progress_bar=False)
        answer = {"seconds": time.monotonic() - started, "vectors": len(vectors)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
