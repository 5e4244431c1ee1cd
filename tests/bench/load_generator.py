"""Many streams at once to the daemon, from one process that only asks and reads.

`python -m tests.bench.load_generator MODEL THREADS STREAMS PROMPT TOKENS`: one connection, every request
with an id. Prints `{"rate": …}`: prompt and generated tokens a second,
from the first byte sent to the last done event.
"""

from __future__ import annotations

import json
import random
import sys
import time
from typing import Any

from myllm.client.dial import dial_daemon

WORDS = ("alpha", "river", "seven", "quick", "under", "garden", "because", "music", "table", "nobody")


def main() -> None:
    model, threads, *counts = sys.argv[1:]
    n_streams, n_prompt, n_tokens = map(int, counts)
    client = dial_daemon()
    if client is None:
        raise SystemExit("no daemon answers")
    with client:
        started = time.monotonic()
        for number in range(n_streams):
            client.send(_request(number, model, int(threads), n_prompt, n_tokens))
        usages: list[dict[str, Any]] = []
        for line in client.events():
            if b'"done":true' in line and (event := json.loads(line)).get("done") is True:
                usages.append(event["usage"])
                if len(usages) == n_streams:
                    break
        seconds = time.monotonic() - started
    total = sum(usage["prompt_tokens"] + usage["completion_tokens"] for usage in usages)
    print(json.dumps({"rate": total / seconds, "tokens": total}))


def _request(number: int, model: str, threads: int, n_prompt: int, n_tokens: int) -> dict[str, Any]:
    """A batch's request for exactly so many greedy tokens after about so many of a prompt of its own."""
    source = random.Random((number, time.monotonic_ns()).__hash__())
    return {
        "op": "gen",
        "id": number,
        "model": model,
        "options": {"threads": threads},
        "prompt": " ".join(source.choices(WORDS, k=n_prompt)),
        "raw": True,
        "max_tokens": n_tokens,
        "ignore_eos": True,
        "temperature": 0,
        "priority": 1,
    }


main()
