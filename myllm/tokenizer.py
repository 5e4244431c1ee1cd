"""What a tokenizer is to those who use one: text ⇄ token ids.

A leaf, as engines implement it and prompts are made with it, and neither knows the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Tokenizer(Protocol):
    """A model's vocabulary: text ⇄ tokens. Thread-safe."""

    @property
    def special_tokens(self) -> Sequence[str]:
        """Texts that `encode` with `special` reads as one control token; the same object each time."""

    @property
    def bos(self) -> int | None:
        """The token a text begins with."""

    @property
    def eos(self) -> int | None:
        """The token a text ends with."""

    @property
    def add_bos(self) -> bool:
        """Whether the model wants every prompt to begin with `bos`."""

    @property
    def bos_text(self) -> str:
        """`bos` as templates write it, or an empty string."""

    @property
    def eos_text(self) -> str:
        """`eos` as templates write it, or an empty string."""

    @property
    def closing(self) -> int | None:
        """The token that a text to embed ends with, where the model wants one."""

    @property
    def max_piece_bytes(self) -> int:
        """Bytes of the longest token's text: no text has fewer tokens than its bytes by this."""

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Tokens of `text` alone, no bos or eos added; control tokens in it are read only if `special`."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; a cut character comes out as U+FFFD."""
