"""What status says of an engine's work, from steps told by hand."""

from __future__ import annotations

import pytest

from myllm.engine.counters import LATELY, Counters


def test_the_pace_is_that_of_the_last_seconds_steps() -> None:
    counters = Counters()
    for second, tokens in ((0.0, 1), (20.0, 4), (20.5, 4)):
        for _ in range(tokens):
            counters.generated()
        counters.stepped(second, second + 0.5, prompt_tokens=100)
    assert counters.as_message(21.0)["tokens_per_second"] == pytest.approx(8)
    assert counters.as_message(21.0)["generated_tokens"] == 9
    assert counters.as_message(20.5 + LATELY + 0.1)["tokens_per_second"] == pytest.approx(8)
    assert counters.as_message(21.1 + LATELY)["tokens_per_second"] == 0


def test_the_hit_rate_is_of_all_prompts_so_far_and_zero_before_any() -> None:
    counters = Counters()
    assert counters.as_message(0.0)["kv_hit_rate"] == 0
    counters.admitted(100, 0)
    counters.admitted(100, 99)
    assert counters.as_message(0.0)["kv_hit_rate"] == 0.495
