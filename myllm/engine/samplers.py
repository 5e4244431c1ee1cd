"""The sampler a request asks for, on a given model."""

from __future__ import annotations

from collections.abc import Mapping

from myllm.engine import sampling
from myllm.engine.llama import Model, Sampler, Tokenizer
from myllm.errors import UsageError
from myllm.protocol import GenRequest

NEVER = float("-inf")
"""The bias of a token that must not be sampled."""


def make_sampler(
    request: GenRequest, prompt: list[int], seed: int, recommended: Mapping[str, float], model: Model
) -> Sampler | None:
    """The chain for `request`, or None where the largest logit is simply taken.

    Raises UsageError for a bias on a text that is not one token, BadDataError for what llama.cpp refuses.
    """
    tokenizer = model.tokenizer
    values = sampling.effective(request.sampling, recommended)
    biases = dict.fromkeys(tokenizer.suppressed, NEVER)
    if request.ignore_eos:
        biases |= dict.fromkeys(tokenizer.end_tokens, NEVER)
    biases |= {_token(name, tokenizer): value for name, value in request.logit_bias.items()}
    if sampling.is_greedy(values, bool(biases)):
        return None
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
