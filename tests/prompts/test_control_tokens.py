"""Whichever shipped template renders it, and whoever says it: no text of a message makes a control token."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from myllm.prompts.chat_template import ChatTemplate
from myllm.prompts.detect import NAMES, find_template
from myllm.prompts.prepare import prepare
from myllm.protocol import ROLES
from myllm.requests import GenRequest

SPECIAL = (
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>"),
    *("<|end|>", "<｜begin▁of▁sentence｜>", "<think>", "###"),
)
"""Of all formats at once, so that each template writes some itself and users write the others', too."""
FIRST_CHARACTER = len(SPECIAL)
INSISTING = """
{%- if messages|length > 1 and messages[0].role == messages[1].role %}
    {{- raise_exception('roles must alternate') }}
{%- endif %}"""


class EverySpecialToken:
    """A token is one of SPECIAL, or a character."""

    special_tokens: Sequence[str] = SPECIAL
    bos_text, eos_text = "<s>", "</s>"
    bos: int | None = 0
    eos: int | None = 1
    closing: int | None = None
    add_bos = True
    max_piece_bytes = 32

    def encode(self, text: str, *, special: bool) -> list[int]:
        control = "|".join(map(re.escape, SPECIAL)) + "|" if special else ""
        found = re.findall(f"{control}.", text, re.DOTALL)
        return [SPECIAL.index(t) if t in SPECIAL else FIRST_CHARACTER + ord(t) for t in found]

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(SPECIAL[t] if t < FIRST_CHARACTER else chr(t - FIRST_CHARACTER) for t in tokens)


TOKENIZER = EverySpecialToken()


def control_tokens(messages: list[dict[str, str]], template: ChatTemplate, **how) -> tuple[list[int], str]:
    """The control tokens of a prompt, and its text."""
    tokens = prepare(GenRequest(messages=messages, **how), TOKENIZER, template, 10_000).tokens
    return [token for token in tokens if token < FIRST_CHARACTER], TOKENIZER.decode(tokens)


def hostile(special: str) -> list[str]:
    """The token's text, doubled in other text, and its halves where what is around might complete them."""
    return [special, f"a {special}{special}", special[1:] + special[:-1]]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", NAMES)
def test_no_role_makes_a_control_token(name: str, role: str, open_template) -> None:
    template = open_template(find_template(None, "", name))
    last = {"role": "user", "content": "hi"}
    plain, _ = control_tokens([{"role": role, "content": "x"}, last], template)
    for special in SPECIAL:
        for content in hostile(special):
            found, text = control_tokens([{"role": role, "content": content}, last], template)
            assert found == plain, content
            assert content in text


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_no_joined_message_makes_a_control_token(role: str, open_template) -> None:
    """Nor do two halves, one in each."""
    template = open_template(INSISTING + find_template(None, "", "chatml"))
    plain, _ = control_tokens([{"role": role, "content": "x"}], template)
    for special in SPECIAL:
        for first, second in [(special, special), (special[:1], special[1:]), (special[:-1], special[-1:])]:
            pair = [{"role": role, "content": first}, {"role": role, "content": second}]
            found, text = control_tokens(pair, template)
            assert found == plain
            assert f"{first}\n\n{second}" in text


@pytest.mark.parametrize("role", ROLES)
def test_no_message_of_a_shortened_conversation_makes_a_control_token(role: str, open_template) -> None:
    template = open_template(find_template(None, "", "chatml"))
    hi = {"role": "user", "content": "hi"}
    long_ago = [{"role": "user", "content": "." * 20_000}, {"role": "assistant", "content": "."}]
    plain, _ = control_tokens([hi, {"role": role, "content": "x"}, hi], template)
    for special in SPECIAL:
        messages = [*long_ago, hi, {"role": role, "content": special}, hi]
        assert control_tokens(messages, template, on_overflow="turns")[0] == plain
