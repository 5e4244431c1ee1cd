"""Log-probabilities of a token and its rivals from raw logits. Pure."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_probabilities(
    logits: NDArray[np.float32], token: int, top: int
) -> tuple[float, list[tuple[int, float]]]:
    """log P(token) and the `top` likeliest (token, log P), best first, from raw logits `(n_vocab,)`, in nats.

    That is the model's own distribution: sampling parameters do not change it.
    """
    shifted = logits.astype(np.float64)
    shifted -= shifted.max()
    shifted -= np.log(np.exp(shifted).sum())
    top = min(top, len(shifted))
    if not top:
        return float(shifted[token]), []
    best = np.argpartition(shifted, -top)[-top:].tolist()
    ranked = sorted(((int(t), float(shifted[t])) for t in best), key=lambda pair: (-pair[1], pair[0]))
    return float(shifted[token]), ranked
