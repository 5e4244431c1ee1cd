"""llama.cpp's sampler chains, and which one a request asks for. One thread owns a sampler."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from myllm.engine import sampling
from myllm.engine.context import Context
from myllm.engine.llama import Model, Tokenizer, lib
from myllm.engine.sampling import Step
from myllm.errors import BadDataError, UsageError
from myllm.requests import GenRequest

NEVER: Final = float("-inf")
"""The bias of a token that must not be sampled."""
DRY_BREAKERS: Final = (b"\n", b":", b'"', b"*")
"""Where DRY's repeated runs end: llama.cpp's default sequence breakers."""


class Sampler:
    """A chain of llama.cpp samplers with its own state (seed, penalties)."""

    def __init__(self, steps: Sequence[Step], model: Model) -> None:
        params = lib.llama_sampler_chain_default_params()
        params.no_perf = True
        self._chain = lib.llama_sampler_chain_init(params)
        for step in steps:
            sampler = self._make(step, model)
            if not sampler:
                raise BadDataError(f"sampling: llama.cpp does not take {step.name} {step.arguments}")
            lib.llama_sampler_chain_add(self._chain, sampler)

    def sample(self, context: Context, index: int, logits: NDArray[np.float32]) -> int:
        """The next token by the `logits` of batch index `index`; the chain remembers it."""
        return int(lib.llama_sampler_sample(self._chain, context.pointer, index))

    def accept(self, tokens: Sequence[int]) -> None:
        """Tells the penalties about tokens that were not sampled here (the prompt's end)."""
        for token in tokens:
            lib.llama_sampler_accept(self._chain, token)

    def close(self) -> None:
        if self._chain:
            lib.llama_sampler_free(self._chain)
            self._chain = None

    @staticmethod
    def _make(step: Step, model: Model) -> Any:
        make = getattr(lib, f"llama_sampler_init_{step.name}")
        if step.name == "logit_bias":
            n_vocab, biases = step.arguments
            array = (lib.llama_logit_bias * len(biases))(*biases.items())
            return make(n_vocab, len(biases), array)
        if step.name == "dry":
            breakers = (ctypes.c_char_p * len(DRY_BREAKERS))(*DRY_BREAKERS)
            return make(model.tokenizer._vocab, *step.arguments, breakers, len(DRY_BREAKERS))
        return make(*step.arguments)


class Greedy:
    """Takes the largest logit, but none of `banned`; needs no chain, and no list of candidates."""

    def __init__(self, banned: Sequence[int]) -> None:
        self._banned = list(banned)

    def sample(self, context: Context, index: int, logits: NDArray[np.float32]) -> int:
        if self._banned:
            logits = logits.copy()
            logits[self._banned] = NEVER
        return int(logits.argmax())

    def close(self) -> None:
        """It holds nothing."""


def make_sampler(
    request: GenRequest, prompt: list[int], seed: int, recommended: Mapping[str, float], model: Model
) -> Sampler | Greedy:
    """The sampler for `request`, with the state that its prompt leaves.

    Raises UsageError for a bias on a text that is not one token, BadDataError for what llama.cpp refuses.
    """
    tokenizer = model.tokenizer
    values = sampling.effective(request.sampling, recommended)
    biases = dict.fromkeys(tokenizer.suppressed, NEVER)
    if request.ignore_eos:
        biases |= dict.fromkeys(tokenizer.end_tokens, NEVER)
    biases |= {_token(name, tokenizer): value for name, value in request.logit_bias.items()}
    if sampling.is_greedy(values) and all(bias == NEVER for bias in biases.values()):
        return Greedy(list(biases))
    sampler = Sampler(sampling.chain(values, seed, tokenizer.n_vocab, biases), model)
    if sampling.is_penalised(values):
        sampler.accept(prompt)
    return sampler


def _token(name: str, tokenizer: Tokenizer) -> int:
    """The token that a bias names by its id or its text."""
    if name.isdecimal() and int(name) < tokenizer.n_vocab:
        return int(name)
    tokens = tokenizer.encode(name, special=True)
    if len(tokens) != 1:
        raise UsageError(f"logit_bias: {name!r} is {len(tokens)} tokens of this model; give one, or its id")
    return tokens[0]
