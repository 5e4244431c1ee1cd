"""Rows and prompt tokens a step is worth, learnt from made-up step times."""

from __future__ import annotations

from collections.abc import Callable

from myllm.engine.device import TILE_ROWS
from myllm.engine.pace import PrefillBudget, RowLimit


def settle(seconds: Callable[[int], float], most: int = TILE_ROWS - 1, steps: int = 600) -> int:
    """The limit where a step of n rows takes `seconds(n)` and as many as allowed always ran."""
    rows = RowLimit(most, 16)
    for _ in range(steps):
        rows.observe(rows.limit, seconds(rows.limit))
    return rows.limit


def test_rows_grow_while_they_pay_off() -> None:
    assert settle(lambda n: 1.0) == TILE_ROWS - 1


def test_rows_stop_where_the_machine_saturates() -> None:
    assert settle(lambda n: max(n, 24) / 24) == 24


def test_rows_never_pass_what_was_asked_for() -> None:
    assert settle(lambda n: 1.0, most=5) == 5


def test_a_low_rung_measured_in_passing_is_taken_when_it_is_as_good() -> None:
    rows = RowLimit(63, 16)
    for n in [*range(16, 0, -1)] * 40:
        rows.observe(n, max(n, 8) / 8)
    assert rows.limit in (8, 12)


def test_one_slow_step_does_not_move_the_limit() -> None:
    rows = RowLimit(63, 16)
    for step in range(400):
        rows.observe(rows.limit, (30 if step % 7 == 3 else 1) * max(rows.limit, 16) / 16)
    assert rows.limit == 16


def test_a_step_beside_running_rows_takes_no_more_than_its_pace_allows() -> None:
    budget = PrefillBudget(512)
    for _ in range(50):
        budget.observe(16, 0, 0.1)
        tokens = budget.tokens(16, 47)
        budget.observe(16, tokens, 0.1 + tokens * 0.01)
    step = 0.1 + budget.tokens(16, 47) * 0.01
    assert 0.2 < step <= 0.1 * PrefillBudget.PACE + 0.01


def test_an_idle_engine_prefills_in_steps_of_half_a_second() -> None:
    budget = PrefillBudget(512)
    for _ in range(50):
        budget.observe(0, budget.tokens(0, 63), budget.tokens(0, 63) / 300)
    assert abs(budget.tokens(0, 63) / 300 - PrefillBudget.ALONE) < 0.05


def test_cheap_prompt_tokens_still_stay_within_their_room() -> None:
    budget = PrefillBudget(512)
    budget.observe(16, 0, 1.0)
    budget.observe(16, 32, 1.0001)
    assert budget.tokens(16, 47) == 47
