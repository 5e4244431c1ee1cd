"""A tokenizer of words for the prompt tests, and templates whose children end with the test."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import pytest

from myllm.prompts.chat_template import ChatTemplate, Limits

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")


class WordTokenizer:
    """A token is a control token's text, a word with the space before it, or one character.

    Words are cut at 8 characters, so `max_piece_bytes` (8 characters of at most 4 bytes) is true.
    """

    special_tokens: Sequence[str] = SPECIAL
    bos_text, eos_text = "<s>", "</s>"
    max_piece_bytes = 32

    def __init__(self, *, add_bos: bool = False) -> None:
        self.add_bos = add_bos
        self.ids = {text: i for i, text in enumerate(SPECIAL)}
        self.encoded_chars = 0
        self.bos: int | None = 0
        self.eos: int | None = 1

    def encode(self, text: str, *, special: bool) -> list[int]:
        self.encoded_chars += len(text)
        control = "|".join(map(re.escape, SPECIAL)) + "|" if special else ""
        found = re.findall(rf"{control} ?\w{{1,7}}|.", text, re.DOTALL)
        return [self.ids.setdefault(piece, len(self.ids)) for piece in found]

    def decode(self, tokens: Sequence[int]) -> str:
        texts = list(self.ids)
        return "".join(texts[token] for token in tokens)


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer()


@pytest.fixture
def bos_tokenizer() -> WordTokenizer:
    return WordTokenizer(add_bos=True)


Open = Callable[..., ChatTemplate]


@pytest.fixture
def open_template() -> Iterator[Open]:
    """Makes templates and ends their children after the test."""
    opened: list[ChatTemplate] = []

    def make(source: str, limits: Limits | None = None) -> ChatTemplate:
        opened.append(ChatTemplate(source, limits))
        return opened[-1]

    yield make
    for template in opened:
        template.close()
