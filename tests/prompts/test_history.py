"""What of a conversation is sent: what must stay stays, and its beginning moves seldom."""

from __future__ import annotations

from collections.abc import Sequence
from time import process_time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from myllm.prompts.history import SYSTEM, Counted, fit_history

ROLES = ["system", "developer", "user", "assistant", "tool"]
anything = st.lists(st.builds(Counted, st.sampled_from(ROLES), st.integers(0, 60)), max_size=40)
turns = st.lists(
    st.tuples(st.integers(1, 60), st.lists(st.integers(1, 60), max_size=3), st.integers(1, 60)), max_size=20
).map(
    lambda sizes: [
        Counted(role, n_tokens)
        for question, results, answer in sizes
        for role, n_tokens in [
            ("user", question),
            *(call for result in results for call in (("assistant", 5), ("tool", result))),
            ("assistant", answer),
        ]
    ]
)
"""Whole turns, some with tools called before the answer."""
fixed_and_budget = st.tuples(st.integers(0, 20), st.integers(1, 400))


def kept(messages: Sequence[Counted], first: int) -> list[Counted]:
    return [message for i, message in enumerate(messages) if i >= first or message.role in SYSTEM]


def size(messages: Sequence[Counted]) -> int:
    return sum(message.n_tokens for message in messages)


def last_user(messages: Sequence[Counted]) -> int:
    return max((i for i, message in enumerate(messages) if message.role == "user"), default=0)


@given(anything, fixed_and_budget)
def test_the_budget_is_kept_wherever_it_can_be(messages: list[Counted], limits: tuple[int, int]) -> None:
    fixed, budget = limits
    first = fit_history(messages, fixed, budget)
    assert fixed + size(kept(messages, first)) <= budget or first == last_user(messages)


@given(anything, fixed_and_budget)
def test_instructions_and_all_from_the_last_user_message_on_stay(
    messages: list[Counted], limits: tuple[int, int]
) -> None:
    first = fit_history(messages, *limits)
    assert first <= last_user(messages)
    sent = kept(messages, first)
    assert [m for m in sent if m.role in SYSTEM] == [m for m in messages if m.role in SYSTEM]
    assert sent[len(sent) - len(messages[first:]) :] == messages[first:]


@given(anything, fixed_and_budget)
def test_what_is_sent_of_a_cut_conversation_begins_with_a_user_message(
    messages: list[Counted], limits: tuple[int, int]
) -> None:
    first = fit_history(messages, *limits)
    assert first == 0 or messages[first].role == "user"


@given(anything, st.integers(0, 20))
def test_nothing_goes_while_all_fits(messages: list[Counted], fixed: int) -> None:
    assert fit_history(messages, fixed, fixed + size(messages)) == 0


@given(turns, st.integers(1, 60), fixed_and_budget)
def test_turns_go_only_when_the_budget_is_overstepped_and_then_to_three_quarters(
    messages: list[Counted], question: int, limits: tuple[int, int]
) -> None:
    """The prompt before the last answer, and this one: the beginning is the same wherever that still fits."""
    fixed, budget = limits
    asked = [*messages, Counted("user", question)]
    earlier = fit_history(messages[:-1], fixed, budget)
    now = fit_history(asked, fixed, budget)
    assert now >= earlier
    if fixed + size(asked[earlier:]) <= budget:
        assert now == earlier
    elif now < len(messages):
        assert fixed + size(asked[now:]) <= max(budget * 3 // 4, (fixed + budget) // 2)


@given(turns, turns, st.integers(1, 60), fixed_and_budget)
def test_what_is_no_longer_sent_has_no_say_in_what_follows(
    past: list[Counted], future: list[Counted], question: int, limits: tuple[int, int]
) -> None:
    """So whoever keeps a conversation need not even count what went."""
    past = [Counted("system", 7), *past, Counted("user", question)]
    future = [Counted("assistant", 3), *future]
    left = kept(past, fit_history(past, *limits))
    whole = kept([*past, *future], fit_history([*past, *future], *limits))
    assert kept([*left, *future], fit_history([*left, *future], *limits)) == whole


def test_a_long_system_prompt_leaves_half_of_its_rest_to_the_history() -> None:
    """Three quarters of the budget are less than the system prompt alone."""
    turn = [Counted("user", 10), Counted("assistant", 10)]
    messages = [Counted("system", 900), *turn * 5, Counted("user", 10)]
    first = fit_history(messages, 0, 1000)
    assert 900 + size(messages[first:]) == 950


@pytest.mark.parametrize("n_turns", [60, 500])
def test_in_most_turns_the_prompt_before_is_the_beginning_of_the_next(n_turns: int) -> None:
    """A window of 2,048 with 512 tokens for the answer, and 40 tokens a turn."""
    messages = [Counted("system", 30)]
    n_reused, first = 0, 0
    for turn in range(n_turns):
        messages.append(Counted("user", 15 + turn % 7))
        now = fit_history(messages, 4, 2048 - 512)
        n_reused += now == first
        first = now
        messages.append(Counted("assistant", 24 - turn % 7))
    assert first > 0
    assert n_reused / n_turns >= 0.85


def test_ten_thousand_turns_that_are_all_too_long_are_decided_in_no_time() -> None:
    messages = [Counted("user", 900), Counted("assistant", 900)] * 10_000
    started = process_time()
    assert fit_history(messages, 0, 1000) == len(messages) - 2
    assert process_time() - started < 0.5
