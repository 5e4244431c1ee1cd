"""From a request to a generation: what it asks for is checked against the model, once, before it waits.

Must not know the scheduler, the context or what else is in flight.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import NamedTuple

from myllm.engine.generation import Generation, Times
from myllm.engine.llama import Model
from myllm.engine.samplers import make_sampler
from myllm.engine.sequence import Sequence
from myllm.engine.text import TextStream
from myllm.errors import BadDataError, ContextOverflowError
from myllm.protocol import MAX_SEED
from myllm.requests import Arrival, GenRequest


class Capabilities(NamedTuple):
    """What an engine has for every request: a window in tokens, and the sampling that its model asks for."""

    model: Model
    window: int
    recommended: Mapping[str, float]


def new_generation(
    request: GenRequest, prompt: list[int], arrival: Arrival, engine: Capabilities, number: int
) -> Generation:
    """The generation of a request, the `number`-th to arrive.

    Raises BadDataError where the model makes no text, ContextOverflowError, UsageError.
    """
    if engine.model.is_encoder:
        raise BadDataError("model: it makes embeddings, not text; use `myllm embed`, or give another -m")
    if len(prompt) >= engine.window:
        raise ContextOverflowError(
            f"prompt: {len(prompt):,} tokens do not fit the window of {engine.window:,}; shorten it"
        )
    answer = engine.window if request.max_tokens is None else request.max_tokens
    limit = min(len(prompt) + answer, engine.window)
    seed = secrets.randbelow(MAX_SEED) if request.seed is None else request.seed
    return Generation(
        request,
        Sequence(arrival.id, list(prompt), limit, request.priority, number, arrival.client),
        Times(arrival.at),
        n_prompt=len(prompt),
        seed=seed,
        sampler=make_sampler(request, prompt, seed, engine.recommended, engine.model),
        text=TextStream(request.stop),
    )
