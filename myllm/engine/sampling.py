"""Sampling parameters → the chain of llama.cpp samplers, as data.

Pure. The order is llama.cpp's own (common/sampling.cpp, common_sampler_init): biases, penalties,
DRY, top-n-σ, top-k, typical, top-p, min-p, XTC, temperature, then the draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from myllm.protocol import SAMPLING

MIN_KEEP = 1
MIROSTAT_M = 100
"""Tokens mirostat 1 estimates its exponent from; llama.cpp's constant."""


class Step(NamedTuple):
    """One sampler of the chain: the name after `llama_sampler_init_` and its arguments."""

    name: str
    arguments: tuple[Any, ...]


def effective(request: Mapping[str, float], model: Mapping[str, float]) -> dict[str, float]:
    """Every parameter's value: the request's, else the model file's recommendation, else MyLLM's default."""
    return {name: request.get(name, model.get(name, p.default)) for name, p in SAMPLING.items()}


def is_greedy(values: Mapping[str, float]) -> bool:
    """Whether the chain would always pick the largest logit, so that no chain is needed."""
    return values["temperature"] <= 0 and not values["mirostat"] and not is_penalised(values)


def is_penalised(values: Mapping[str, float]) -> bool:
    """Whether earlier tokens change the odds, so that the prompt's end must be told to the chain."""
    flat = (
        values["repeat_penalty"] == 1 and not values["frequency_penalty"] and not values["presence_penalty"]
    )
    return bool(values["repeat_last_n"] and not flat) or values["dry_multiplier"] > 0


def chain(values: Mapping[str, float], seed: int, n_vocab: int, biases: Mapping[int, float]) -> list[Step]:
    """The samplers for `values` in order; steps that would change nothing are left out."""
    v = values
    steps = [Step("logit_bias", (n_vocab, dict(biases)))] if biases else []
    if is_penalised(v):
        penalties = (v["repeat_penalty"], v["frequency_penalty"], v["presence_penalty"])
        steps.append(Step("penalties", (n_vocab, int(v["repeat_last_n"]), *penalties)))
    if v["dry_multiplier"] > 0:
        lengths = (int(v["dry_allowed_length"]), int(v["dry_penalty_last_n"]))
        steps.append(Step("dry", (v["dry_multiplier"], v["dry_base"], *lengths)))
    if v["temperature"] <= 0 and not v["mirostat"]:
        return [*steps, Step("greedy", ())]
    temperature = Step("temp_ext", (v["temperature"], v["dynatemp_range"], v["dynatemp_exponent"]))
    if v["mirostat"] == 1:
        arguments = (n_vocab, seed, v["mirostat_tau"], v["mirostat_eta"], MIROSTAT_M)
        return [*steps, temperature, Step("mirostat", arguments)]
    if v["mirostat"] == 2:
        return [*steps, temperature, Step("mirostat_v2", (seed, v["mirostat_tau"], v["mirostat_eta"]))]
    filters = [
        (v["top_n_sigma"] > 0, Step("top_n_sigma", (v["top_n_sigma"],))),
        (v["top_k"] > 0, Step("top_k", (int(v["top_k"]),))),
        (v["typical_p"] < 1, Step("typical", (v["typical_p"], MIN_KEEP))),
        (v["top_p"] < 1, Step("top_p", (v["top_p"], MIN_KEEP))),
        (v["min_p"] > 0, Step("min_p", (v["min_p"], MIN_KEEP))),
        (v["xtc_probability"] > 0, Step("xtc", (v["xtc_probability"], v["xtc_threshold"], MIN_KEEP, seed))),
    ]
    return [*steps, *(step for wanted, step in filters if wanted), temperature, Step("dist", (seed,))]
