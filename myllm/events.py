"""Events that the runtime itself makes or completes: requests that ended before an engine had them.

Pure. Must not know connections, workers or clocks.
"""

from __future__ import annotations

from myllm.protocol import Message


def ended_early(op: str, finish_reason: str) -> Message:
    """The done event of a request for `op` that ended before an engine had it, in the shape that the
    operation's others have: nothing made, nothing used."""
    if op == "embed":
        return {
            "done": True,
            "dimensions": 0,
            "finish_reason": finish_reason,
            "usage": {"prompt_tokens": 0, "cached_texts": 0},
            "timings": {"queue_ms": 0.0, "embed_ms": 0.0},
        }
    if op not in ("gen", "chat"):
        return {"done": True, "finish_reason": finish_reason}
    return {
        "done": True,
        "full_text": "",
        "finish_reason": finish_reason,
        "usage": {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "dropped_messages": 0},
        "timings": {
            "queue_ms": 0.0,
            "prefill_ms": 0.0,
            "ttft_ms": 0.0,
            "decode_ms": 0.0,
            "tokens_per_second": 0.0,
        },
    }


def completed(event: Message, model: str, load_ms: float) -> Message:
    """A done event with what only the Runtime knows: the model's name, and how long it waited for it."""
    head: Message = {key: event[key] for key in ("done", "full_text", "reasoning_text") if key in event}
    whole: Message = {**head, "model": model, **event}
    if timings := event.get("timings"):
        queue_ms = timings.get("queue_ms", 0.0)
        whole["timings"] = {"queue_ms": queue_ms, "load_ms": round(load_ms, 1), **timings}
    return whole
