"""Ids of sessions and messages: numbers that grow with time, so written that few characters tell them apart.

Owns their making and spelling. Pure but for chance. Must not know where ids are kept.

An id is 50 bits in Crockford's base 32, lower case: the second it was made, which is exactly the first seven
of its ten characters, and 15 bits of chance, which keep two machines' ids apart. So text and number sort
alike, and what was made in different seconds differs within seven characters.
"""

from __future__ import annotations

import secrets
from typing import Final

DIGITS: Final = "0123456789abcdefghjkmnpqrstvwxyz"
LENGTH: Final = 10
SHORTEST_PREFIX: Final = 4
"""As git's: fewer characters stand for weeks, and name what was not meant."""
_BITS: Final = 5
_CHANCE_BITS: Final = 15
_LAST_SECOND: Final = 2**34 - 1
"""In the year 2514: half of the numbers are left to count on in, wherever a clock has been."""
_VALUES: Final = {digit: value for value, digit in enumerate(DIGITS)}


def number_at(seconds: float) -> int:
    """A number for `seconds` since the epoch; of those of one second a random one."""
    second = min(max(int(seconds), 0), _LAST_SECOND)
    return second << _CHANCE_BITS | secrets.randbits(_CHANCE_BITS)


def number_after(last: int, seconds: float) -> int:
    """A number for `seconds`, but greater than `last`: where the clock jumped back they count on."""
    return max(number_at(seconds), last + 1)


def written(number: int) -> str:
    """A number as an id."""
    return "".join(DIGITS[number >> shift & 31] for shift in range(_BITS * (LENGTH - 1), -1, -_BITS))


def parsed(text: str) -> int | None:
    """An id's number; None for what is no id."""
    span = prefix_span(text)
    return span[0] if span and len(text) == LENGTH else None


def prefix_span(text: str) -> tuple[int, int] | None:
    """The least and the greatest number whose ids begin with `text`; None for what none can begin with."""
    values = [_VALUES.get(character) for character in text.lower()]
    if not SHORTEST_PREFIX <= len(values) <= LENGTH:
        return None
    least = 0
    for value in values:
        if value is None:
            return None
        least = least << _BITS | value
    free = _BITS * (LENGTH - len(values))
    return least << free, (least + 1 << free) - 1
