"""Parameters to sampler chains, and log-probabilities against numpy's plain definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.engine.logprobs import log_probabilities
from myllm.engine.sampling import Step, chain, effective, is_greedy, is_penalised
from myllm.protocol import SAMPLING


def names(**given_values: float) -> list[str]:
    return [step.name for step in chain(effective(given_values, {}), 1, 100, {})]


def test_the_default_chain_is_llama_cpps_order_without_what_does_nothing() -> None:
    assert names() == ["top_k", "top_p", "min_p", "temp_ext", "dist"]


def test_temperature_zero_is_greedy_and_needs_no_chain_unless_something_changes_the_logits() -> None:
    greedy = effective({"temperature": 0}, {})
    assert is_greedy(greedy)
    assert not is_greedy(effective({"temperature": 0, "repeat_penalty": 1.1}, {}))
    assert not is_greedy(effective({"temperature": 0, "mirostat": 2}, {}))
    assert names(temperature=0, repeat_penalty=1.1) == ["penalties", "greedy"]


def test_biases_and_penalties_come_before_every_filter() -> None:
    steps = chain(effective({"presence_penalty": 1, "dry_multiplier": 0.8}, {}), 1, 100, {5: 2.0})
    assert [step.name for step in steps[:3]] == ["logit_bias", "penalties", "dry"]
    assert steps[0] == Step("logit_bias", (100, {5: 2.0}))


def test_mirostat_replaces_the_filters() -> None:
    assert names(mirostat=1) == ["temp_ext", "mirostat"]
    assert names(mirostat=2, top_k=5) == ["temp_ext", "mirostat_v2"]


def test_the_seed_reaches_the_draw() -> None:
    assert chain(effective({}, {}), 77, 100, {})[-1] == Step("dist", (77,))


def test_the_request_wins_over_the_models_file_and_that_over_the_default() -> None:
    values = effective({"top_k": 3}, {"top_k": 64, "temperature": 1.5})
    assert (values["top_k"], values["temperature"], values["min_p"]) == (3, 1.5, SAMPLING["min_p"].default)


def test_penalties_without_a_window_do_nothing() -> None:
    assert not is_penalised(effective({"repeat_penalty": 1.5, "repeat_last_n": 0}, {}))
    assert is_penalised(effective({"repeat_penalty": 1.5}, {}))


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=40), st.integers(0, 30), st.data())
def test_log_probabilities_are_a_log_softmax(logits: list[float], top: int, data: st.DataObject) -> None:
    token = data.draw(st.integers(0, len(logits) - 1))
    expected = np.array(logits) - np.logaddexp.reduce(logits)
    logprob, ranked = log_probabilities(np.array(logits, np.float32), token, top)
    assert logprob == pytest.approx(expected[token], abs=1e-9)
    assert [value for _, value in ranked] == pytest.approx(sorted(expected, reverse=True)[:top], abs=1e-9)
    assert all(value == pytest.approx(expected[t], abs=1e-9) for t, value in ranked)
