"""Every event there is: what an answer consists of on the socket, on stdout and behind `data: ` in SSE.

A leaf. Owns the shapes of events, nothing of how they travel: lines are `protocol.py`'s. Must not know who
makes an event or reads it. Moments are milliseconds, sizes tokens, unless a name says otherwise.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from myllm.errors import MyllmError
from myllm.protocol import Message


class Usage(TypedDict):
    """Tokens of one generation; `dropped_tokens` were cut from the prompt to make it fit, `dropped_messages`
    left out of it; of a turn in a session, also what the `window` holds."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    dropped_messages: int
    window: NotRequired[int]
    dropped_tokens: NotRequired[int]


class Timings(TypedDict):
    """Of one generation. They do not overlap, but for `ttft_ms`: arrival at a loaded model to first token."""

    queue_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms: float
    tokens_per_second: float


# ── on the way ──────────────────────────────────────────────────────────────────────────────


def token(text: str, *, reasoning: bool = False) -> Message:
    """Whole characters of the answer, or of the reasoning before it."""
    event: Message = {"token": text, "done": False}
    return {**event, "reasoning": True} if reasoning else event


def vector(item: int, chunk: int, window: tuple[int, int, int], embedding: str, *, cached: bool) -> Message:
    """The vector (base64 of float32) of a text's window: `start`, `end` in characters, and its tokens."""
    start, end, tokens = window
    place = {"item": item, "chunk": chunk, "start": start, "end": end, "tokens": tokens}
    return {**place, "embedding": embedding, "cached": cached}


def no_vector(item: int, error: MyllmError) -> Message:
    """A text that gets none."""
    return {"item": item, "error": error.to_wire()}


def loading(part: float) -> Message:
    """How much of a model is loaded, 0 to 1."""
    return {"loading": round(part, 3)}


def pulling(model: str, n_bytes: int, total: int | None) -> Message:
    """How much of a model has been fetched."""
    return {"pulling": {"model": model, "bytes": n_bytes, "total": total}}


def note(text: str, *, detail: bool = False) -> Message:
    """What the user should know; a `detail`, only who asks for more."""
    return {"note": text, "detail": True} if detail else {"note": text}


# ── the last one ────────────────────────────────────────────────────────────────────────────


def done(**result: Any) -> Message:
    """The last event of an operation that runs nothing on a model: `loaded`, `unloaded`, `status`, …"""
    return {"done": True, **result}


def failed(error: MyllmError) -> Message:
    """The last event of a request that failed."""
    return done(error=error.to_wire())


def counted(prompt_tokens: int, window: int) -> Message:
    """The last event of `count`."""
    return done(usage={"prompt_tokens": prompt_tokens}, window=window)


def generated(
    full_text: str,
    finish_reason: str,
    usage: Usage,
    timings: Timings,
    *,
    reasoning_text: str = "",
    logprobs: list[Message] | None = None,
    seed: int | None = None,
) -> Message:
    """The last event of a generation."""
    event = done(full_text=full_text)
    if reasoning_text:
        event["reasoning_text"] = reasoning_text
    if logprobs:
        event["logprobs"] = logprobs
    event |= {"finish_reason": finish_reason, "usage": usage, "timings": timings}
    return event if seed is None else event | {"seed": seed}


def embedded(
    dimensions: int,
    prompt_tokens: int,
    *,
    cached_texts: int | None = None,
    queue_ms: float = 0.0,
    embed_ms: float = 0.0,
    finish_reason: str | None = None,
) -> Message:
    """The last event of texts to embed; `finish_reason` says why some got nothing. How many texts were cached
    is the Runtime's to tell.
    """
    event = done(dimensions=dimensions)
    if finish_reason:
        event["finish_reason"] = finish_reason
    usage = {"prompt_tokens": prompt_tokens}
    if cached_texts is not None:
        usage["cached_texts"] = cached_texts
    return event | {"usage": usage, "timings": {"queue_ms": queue_ms, "embed_ms": embed_ms}}


def ended_early(op: str, finish_reason: str) -> Message:
    """The last event of a request that ended before a model had it, shaped as its operation's others."""
    if op == "embed":
        return embedded(0, 0, cached_texts=0, finish_reason=finish_reason)
    if op not in ("gen", "chat"):
        return done(finish_reason=finish_reason)
    usage = Usage(prompt_tokens=0, cached_tokens=0, completion_tokens=0, dropped_messages=0)
    timings = Timings(queue_ms=0.0, prefill_ms=0.0, ttft_ms=0.0, decode_ms=0.0, tokens_per_second=0.0)
    return generated("", finish_reason, usage, timings)


def completed(event: Message, model: str, load_ms: float) -> Message:
    """A last event with what only the Runtime knows: the model's name, and how long it waited for it."""
    head: Message = {key: event[key] for key in ("done", "full_text", "reasoning_text") if key in event}
    whole: Message = {**head, "model": model, **event}
    if timings := event.get("timings"):
        queue_ms = timings.get("queue_ms", 0.0)
        whole["timings"] = {"queue_ms": queue_ms, "load_ms": round(load_ms, 1), **timings}
    return whole


def in_session(event: Message, session_id: str) -> Message:
    """A last event of a turn, with the session that it was taken in."""
    head: Message = {key: event[key] for key in ("done", "full_text", "reasoning_text") if key in event}
    return {**head, "session_id": session_id, **event}


def outcome(event: Message) -> Message:
    """What a log may hold of a last event: nothing of what was asked or said."""
    if error := event.get("error"):
        return {"error": error.get("code")}
    return {key: event[key] for key in ("finish_reason", "usage", "timings") if key in event}
