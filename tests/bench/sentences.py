"""Seeded texts to embed: sentences as people write them, and lines of few tokens.

Pure. Of words that are one token each in BERT's vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

ADJECTIVES = ("old", "quiet", "green", "narrow", "public", "famous", "heavy", "modern", "empty", "northern")
NOUNS = (
    *("river", "teacher", "garden", "engine", "letter", "village", "market", "soldier", "window", "summer"),
    *("doctor", "bridge", "winter", "painter", "library", "island", "farmer", "station", "kitchen", "forest"),
)
VERBS = ("follows", "leaves", "carries", "watches", "paints", "finds", "sells", "builds", "crosses", "reads")
ADVERBS = ("slowly", "often", "never", "again", "nearly", "always", "rarely", "quickly")
PREPOSITIONS = ("behind", "near", "without", "under", "before", "against", "beyond", "through")
CLAUSES = (1, 2, 3, 4, 5)


def sentences(count: int) -> list[str]:
    """Sentences of about 35 tokens in the mean, the model's own two included; no two alike."""
    source = random.Random(5)
    return [", and ".join(_clause(source) for _ in range(source.choice(CLAUSES))) + "." for _ in range(count)]


def short_lines(count: int) -> Iterator[str]:
    """Lines of about three words, no two alike."""
    source = random.Random(6)
    return (f"{source.choice(NOUNS)} {number}" for number in range(count))


def _clause(source: random.Random) -> str:
    subject, thing, place = (_noun(source) for _ in range(3))
    action = f"{source.choice(VERBS)} {thing}" if source.random() < 0.5 else source.choice(VERBS)
    return f"{subject} {source.choice(ADVERBS)} {action} {source.choice(PREPOSITIONS)} {place}"


def _noun(source: random.Random) -> str:
    return " ".join(("the", *source.sample(ADJECTIVES, source.randint(0, 1)), source.choice(NOUNS)))
