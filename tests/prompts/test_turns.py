"""Conversations that outgrow the window: what stays, and how little is rendered for it."""

from __future__ import annotations

from itertools import pairwise

import pytest

from myllm.errors import ContextOverflowError
from myllm.prompts import turns
from myllm.prompts.chat import Chat
from myllm.prompts.chat_template import ChatTemplate
from myllm.prompts.detect import NAMES, find_template
from myllm.prompts.prepare import prepare
from myllm.prompts.turns import without_oldest_turns
from myllm.requests import GenRequest

WINDOW = 2048
SYSTEM = {"role": "system", "content": "Be brief."}


def turn(n: int) -> list[dict[str, str]]:
    """About 40 tokens with what templates put around them."""
    return [
        {"role": "user", "content": f"q{n} " + "word " * 9},
        {"role": "assistant", "content": f"a{n} " + "word " * 9},
    ]


def conversation(n_turns: int) -> list[dict[str, str]]:
    """So many turns, of which the last has no answer yet."""
    return [SYSTEM, *(message for n in range(n_turns) for message in turn(n))][:-1]


def ask(messages: list[dict[str, str]], **fields) -> GenRequest:
    return GenRequest(messages=messages, on_overflow="turns", **fields)


def shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


@pytest.mark.parametrize("name", NAMES)
def test_over_sixty_turns_the_prompt_before_is_nearly_always_the_beginning_of_the_next(
    name: str, tokenizer, open_template
) -> None:
    """With every shipped template; and what is kept fits, with the room for the answer."""
    template = open_template(find_template(None, "", name))
    n_reused, before, dropped = 0, [0], 0
    for n_turns in range(1, 81):
        prepared = prepare(ask(conversation(n_turns)), tokenizer, template, WINDOW)
        assert len(prepared.tokens) <= WINDOW - 512
        assert prepared.dropped_messages >= dropped
        n_reused += shared(before, prepared.tokens) >= len(before) - 10  # the last ones open the answer
        before, dropped = prepared.tokens, prepared.dropped_messages
    assert dropped > 0
    assert n_reused / 80 >= 0.85


def test_the_system_message_and_the_newest_turns_stay(tokenizer, open_template) -> None:
    messages = conversation(100)
    template = open_template(find_template(None, "", "chatml"))
    prepared = prepare(ask(messages), tokenizer, template, WINDOW)
    text = tokenizer.decode(prepared.tokens)
    n_kept = len(messages) - prepared.dropped_messages
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert text.count("<|im_start|>") == n_kept + 1
    assert "q99 " in text
    assert "q0 " not in text


def test_a_conversation_that_fits_is_sent_whole(tokenizer, open_template) -> None:
    template = open_template(find_template(None, "", "chatml"))
    whole = prepare(GenRequest(messages=conversation(5)), tokenizer, template, WINDOW)
    assert prepare(ask(conversation(5)), tokenizer, template, WINDOW) == whole


class Recorder(Chat):
    """Notes how many messages it is asked to render."""

    def __init__(self, tokenizer, template: ChatTemplate) -> None:
        super().__init__(tokenizer, template)
        self.n_rendered = 0

    def assemble(self, messages: list[dict[str, str]]) -> list[int]:
        self.n_rendered += len(messages)
        return super().assemble(messages)


def test_ten_thousand_turns_cost_no_more_than_a_few_hundred(tokenizer, open_template) -> None:
    """What goes is not rendered, and what went long ago not even counted."""
    template = open_template(find_template(None, "", "chatml"))
    for n_turns in (500, 10_000):
        chat = Recorder(tokenizer, template)
        tokenizer.encoded_chars = 0
        tokens, n_dropped = without_oldest_turns(conversation(n_turns), chat, tokenizer, None, WINDOW)
        assert len(tokens) > WINDOW // 2
        assert n_dropped > 2 * n_turns - 100
        assert chat.n_rendered < 100
        assert tokenizer.encoded_chars < 60_000


def test_the_beginning_moves_as_seldom_in_a_conversation_that_is_long_past_its_reach(
    tokenizer, open_template
) -> None:
    template = open_template(find_template(None, "", "chatml"))
    prompts = [
        prepare(ask(conversation(n_turns)), tokenizer, template, WINDOW).tokens
        for n_turns in range(900, 1100)
    ]
    n_reused = sum(shared(a, b) >= len(a) - 10 for a, b in pairwise(prompts))
    assert n_reused / len(prompts) >= 0.85


@pytest.mark.parametrize("counted", [1, 5])
def test_what_fits_is_exact_where_the_counts_are_wrong(
    counted: int, tokenizer, open_template, monkeypatch
) -> None:
    """Too low, and the rendering tells."""
    template = open_template(find_template(None, "", "chatml"))
    true_counts = turns._counted

    def low(*given):
        fixed, messages = true_counts(*given)
        return fixed, [message._replace(n_tokens=message.n_tokens - counted) for message in messages]

    monkeypatch.setattr(turns, "_counted", low)
    prepared = prepare(ask(conversation(100)), tokenizer, template, WINDOW)
    assert WINDOW // 2 < len(prepared.tokens) <= WINDOW - 512


def test_the_newest_turn_may_take_the_answers_room(tokenizer, open_template) -> None:
    template = open_template(find_template(None, "", "chatml"))
    newest = {"role": "user", "content": "." * 180}
    prepared = prepare(ask([*conversation(3), *turn(3)[1:], newest]), tokenizer, template, 200)
    assert 180 < len(prepared.tokens) < 200
    assert prepared.dropped_messages == 6


@pytest.mark.parametrize("length", [300, 50_000_000])
def test_a_newest_turn_over_the_window_is_refused(length: int, tokenizer, open_template) -> None:
    """A huge one without tokenising it."""
    template = open_template(find_template(None, "", "chatml"))
    messages = [*conversation(3), *turn(3)[1:], {"role": "user", "content": "." * length}]
    with pytest.raises(ContextOverflowError, match="tokens without the turns before, the window holds 200"):
        prepare(ask(messages), tokenizer, template, 200)
    assert tokenizer.encoded_chars < 10_000


def test_a_prompt_that_is_no_conversation_has_no_turns_to_lose(tokenizer) -> None:
    for raw in (False, True):
        request = GenRequest(prompt="." * 300, raw=raw, on_overflow="turns")
        with pytest.raises(ContextOverflowError, match="the window holds 200"):
            prepare(request, tokenizer, None, 200)
