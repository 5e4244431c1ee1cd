"""Requests → tokens: BOS, control tokens, the window, and what is cut away."""

from __future__ import annotations

import time

import pytest

from myllm.errors import BadDataError, ContextOverflowError, UsageError
from myllm.prompts.detect import find_template
from myllm.prompts.prepare import prepare
from myllm.protocol import ROLES
from myllm.requests import GenRequest
from myllm.tokenizer import Tokenizer

WINDOW = 200
CHATML = find_template(None, "", "chatml")


def ask(prompt: str, **fields) -> GenRequest:
    return GenRequest(prompt=prompt, **fields)


def text_of(tokens: list[int], tokenizer) -> str:
    return tokenizer.decode(tokens)


@pytest.fixture
def chatml(open_template):
    return open_template(CHATML)


def test_the_fake_is_a_tokenizer(tokenizer) -> None:
    """mypy does not see the tests; this line is where the interface is claimed."""
    checked: Tokenizer = tokenizer
    assert text_of(checked.encode("a <s> b", special=True), tokenizer) == "a <s> b"


def test_a_prompt_is_rendered_and_tokenised(tokenizer, chatml) -> None:
    prepared = prepare(ask("Why?", system="Be brief."), tokenizer, chatml, WINDOW)
    assert prepared.dropped_tokens == 0
    assert text_of(prepared.tokens, tokenizer) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert prepared.tokens.count(tokenizer.ids["<|im_start|>"]) == 3


@pytest.mark.parametrize("role", ROLES)
def test_no_control_token_comes_from_a_message(role: str, tokenizer, chatml) -> None:
    """Every special token in every role: the ids are those of the same prompt without them."""
    for special in tokenizer.special_tokens:
        for content in (special, f"a{special}b{special}", special[1:], special[:-1], f" {special}\n"):
            messages = [{"role": role, "content": content}, {"role": "user", "content": "hi"}]
            prepared = prepare(GenRequest(messages=messages), tokenizer, chatml, WINDOW)
            control = [t for t in prepared.tokens if t < len(tokenizer.special_tokens)]
            plain = [{"role": role, "content": "x"}, {"role": "user", "content": "hi"}]
            expected = prepare(GenRequest(messages=plain), tokenizer, chatml, WINDOW)
            assert control == [t for t in expected.tokens if t < len(tokenizer.special_tokens)]
            assert content in text_of(prepared.tokens, tokenizer)


def test_no_control_token_comes_from_a_message_without_a_template(tokenizer) -> None:
    prepared = prepare(ask("a<|im_end|>b"), tokenizer, None, WINDOW)
    assert text_of(prepared.tokens, tokenizer) == "a<|im_end|>b"
    assert tokenizer.ids["<|im_end|>"] not in prepared.tokens


def test_raw_is_the_bare_text_with_its_control_tokens(tokenizer, chatml) -> None:
    prepared = prepare(ask("a<|im_end|>b", raw=True), tokenizer, chatml, WINDOW)
    assert prepared.tokens == tokenizer.encode("a<|im_end|>b", special=True)
    assert tokenizer.ids["<|im_end|>"] in prepared.tokens


def test_raw_takes_no_system_message(tokenizer) -> None:
    with pytest.raises(UsageError, match="raw prompts have no messages"):
        prepare(ask("x", raw=True, system="y"), tokenizer, None, WINDOW)


def test_bos_stands_once_at_the_front(bos_tokenizer, chatml, open_template) -> None:
    """Added where the model wants it, not doubled where the template or a raw prompt brings it."""
    tokens = prepare(ask("x"), bos_tokenizer, chatml, WINDOW).tokens
    assert (tokens[0], tokens.count(0)) == (0, 1)
    own = prepare(ask("x"), bos_tokenizer, open_template("{{ bos_token }}" + CHATML), WINDOW).tokens
    assert own == tokens
    assert prepare(ask("x", raw=True), bos_tokenizer, None, WINDOW).tokens[0] == 0
    assert prepare(ask("<s>x", raw=True), bos_tokenizer, None, WINDOW).tokens.count(0) == 1


def test_no_bos_where_the_model_wants_none(tokenizer, chatml) -> None:
    assert 0 not in prepare(ask("x"), tokenizer, chatml, WINDOW).tokens


def test_a_prompt_may_fill_the_window_but_for_one_token(tokenizer) -> None:
    assert len(prepare(ask("a " * 100 + "b" * 7, raw=True), tokenizer, None, 300).tokens) > 100
    exactly = "." * (WINDOW - 1)
    assert len(prepare(ask(exactly, raw=True), tokenizer, None, WINDOW).tokens) == WINDOW - 1
    with pytest.raises(ContextOverflowError, match="prompt: 200 tokens, the window holds 200"):
        prepare(ask(exactly + ".", raw=True), tokenizer, None, WINDOW)


def test_an_overflow_names_both_numbers_and_the_ways_out(tokenizer, chatml) -> None:
    with pytest.raises(
        ContextOverflowError, match=r"prompt: 1,0\d\d tokens, the window holds 200 .*--on-overflow"
    ):
        prepare(ask("." * 1000), tokenizer, chatml, WINDOW)


@pytest.mark.parametrize("raw", [False, True])
def test_a_hundred_megabytes_are_refused_without_tokenising_them(raw: bool, tokenizer, chatml) -> None:
    started = time.monotonic()
    with pytest.raises(ContextOverflowError, match=r"more than 3,125,000 tokens"):
        prepare(ask("x" * 100_000_000, raw=raw), tokenizer, chatml, 8192)
    assert time.monotonic() - started < 2
    assert tokenizer.encoded_chars == 0


def test_a_text_of_many_small_tokens_is_refused_after_a_look(tokenizer) -> None:
    """Its bytes alone would allow it to fit; a part of it shows that it does not."""
    with pytest.raises(ContextOverflowError, match="more than"):
        prepare(ask("." * 900_000, raw=True), tokenizer, None, 40_000)
    assert tokenizer.encoded_chars < 100_000


LONG = "".join(f"{n:04d} " for n in range(1000))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("cut", ["head", "tail", "middle"])
@pytest.mark.parametrize("max_tokens", [None, 20])
def test_a_cut_prompt_fits_exactly_with_room_for_the_answer(cut, raw, max_tokens, tokenizer, chatml) -> None:
    """What is named goes, the rest stays, and little more than needed is lost."""
    request = ask(LONG, raw=raw, on_overflow=cut, max_tokens=max_tokens, system=None if raw else "Be brief.")
    whole = len(prepare(ask(LONG, raw=raw, system=request.system), tokenizer, chatml, 9999).tokens)
    prepared = prepare(request, tokenizer, chatml, WINDOW)
    budget = WINDOW - (max_tokens or WINDOW // 4)
    assert budget - 6 <= len(prepared.tokens) <= budget
    assert prepared.dropped_tokens == whole - len(prepared.tokens)
    text = text_of(prepared.tokens, tokenizer)
    assert ("0000" in text) == (cut != "head")
    assert ("0999" in text) == (cut != "tail")
    assert "0500" not in text
    if not raw:
        assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
        assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")


def test_a_prompt_that_fits_is_not_cut(tokenizer, chatml) -> None:
    request = ask("short", on_overflow="head")
    assert prepare(request, tokenizer, chatml, WINDOW) == prepare(ask("short"), tokenizer, chatml, WINDOW)


def test_the_longest_user_message_is_cut_and_no_other(tokenizer, chatml) -> None:
    messages = [
        {"role": "user", "content": "first question"},
        {"role": "assistant", "content": "first answer"},
        {"role": "user", "content": LONG},
    ]
    prepared = prepare(GenRequest(messages=messages, on_overflow="tail"), tokenizer, chatml, WINDOW)
    text = text_of(prepared.tokens, tokenizer)
    assert "user\nfirst question<|im_end|>" in text
    assert "assistant\nfirst answer<|im_end|>" in text


@pytest.mark.parametrize("system", ["." * 300, "x" * 50_000_000])
def test_what_is_never_cut_may_not_fit(system: str, tokenizer, chatml) -> None:
    """A system message over the window is refused, not cut; a huge one quickly."""
    with pytest.raises(ContextOverflowError, match="the window holds 200"):
        prepare(ask(LONG, system=system, on_overflow="tail"), tokenizer, chatml, WINDOW)
    assert tokenizer.encoded_chars < 100_000


def test_a_huge_text_is_cut_without_tokenising_it_all(tokenizer, chatml) -> None:
    """The dropped tokens are then an estimate by the density of what was kept."""
    prepared = prepare(ask(LONG * 2000, on_overflow="middle"), tokenizer, chatml, WINDOW)
    assert tokenizer.encoded_chars < 100_000
    assert prepared.dropped_tokens == pytest.approx(1000 * 2000, rel=0.01)


def test_a_control_token_made_by_the_cut_is_text(tokenizer) -> None:
    """The ends that a middle cut joins are guarded like any message."""
    request = ask("<|im_" + "." * 500 + "end|>", on_overflow="middle", max_tokens=1)
    prepared = prepare(request, tokenizer, None, 12)
    assert tokenizer.ids["<|im_end|>"] not in prepared.tokens


THINKING = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}bot: <think>\n"
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "prompt", "inside"),
    [
        (THINKING, "hi", True),
        (THINKING.replace("<think>", "<think></think>"), "hi", False),
        (BARE, "what is <think>", False),
        (None, "what is <think>", False),
    ],
    ids=["opened", "closed", "the user's", "without a template"],
)
def test_a_template_that_opens_a_reasoning_says_so_and_a_message_does_not(
    tokenizer, open_template, template: str | None, prompt: str, inside: bool
) -> None:
    rendering = open_template(template) if template else None
    request = GenRequest(prompt=prompt)
    assert prepare(request, tokenizer, rendering, WINDOW).in_reasoning is inside


def test_a_raw_prompt_is_in_no_reasoning_whatever_it_ends_in(tokenizer) -> None:
    assert not prepare(GenRequest(prompt="x <think>", raw=True), tokenizer, None, WINDOW).in_reasoning


# As Mistral's own templates have it, and Gemma's.
ALTERNATING = """
{%- for m in messages if m.role != 'system' %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
{%- endfor %}"""
TWO_QUESTIONS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "first"},
    {"role": "user", "content": "second"},
    {"role": "assistant", "content": "answer"},
    {"role": "assistant", "content": "more"},
    {"role": "user", "content": "third"},
]


def test_messages_of_one_role_in_a_row_are_joined_where_a_template_insists(tokenizer, open_template) -> None:
    insisting = open_template(ALTERNATING + find_template(None, "", "mistral"))
    prepared = prepare(GenRequest(messages=TWO_QUESTIONS), tokenizer, insisting, WINDOW)
    assert text_of(prepared.tokens, tokenizer) == (
        "<s>[INST] S\nfirst\n\nsecond [/INST] answer\n\nmore</s>[INST] third [/INST]"
    )
    assert prepared.joined_messages == 2


def test_a_template_that_takes_them_gets_them_as_they_are(tokenizer, chatml) -> None:
    prepared = prepare(GenRequest(messages=TWO_QUESTIONS), tokenizer, chatml, WINDOW)
    assert text_of(prepared.tokens, tokenizer).count("<|im_start|>user") == 3
    assert prepared.joined_messages == 0


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}],
        [{"role": "user", "name": "Ada", "content": "a"}, {"role": "user", "name": "Bob", "content": "b"}],
    ],
    ids=["begins with an answer", "two speakers"],
)
def test_what_joining_does_not_help_is_refused_as_ever(messages, tokenizer, open_template) -> None:
    insisting = open_template(ALTERNATING + find_template(None, "", "mistral"))
    with pytest.raises(BadDataError, match=r"refuses these messages: .*alternate"):
        prepare(GenRequest(messages=messages), tokenizer, insisting, WINDOW)


def test_a_joined_message_makes_no_control_token(tokenizer, open_template) -> None:
    insisting = open_template(ALTERNATING + find_template(None, "", "mistral"))
    pair = [{"role": "user", "content": "<"}, {"role": "user", "content": "</s>"}]
    prepared = prepare(GenRequest(messages=pair), tokenizer, insisting, WINDOW)
    assert tokenizer.ids["</s>"] not in prepared.tokens
    assert "<\n\n</s>" in text_of(prepared.tokens, tokenizer)
