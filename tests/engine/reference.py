"""The independent loop: greedy tokens by llama-cpp-python's high-level class. JSON in, JSON out."""

import json
import sys

import numpy as np
from llama_cpp import Llama


def main() -> None:
    request = json.load(sys.stdin)
    model = Llama(
        request["path"],
        n_ctx=1024,
        n_batch=512,
        n_threads=2,
        n_threads_batch=2,
        flash_attn=True,
        logits_all=False,
        verbose=False,
    )
    json.dump([answer(model, prompt, request["n_tokens"]) for prompt in request["prompts"]], sys.stdout)


def answer(model: Llama, prompt: list[int], n_tokens: int) -> dict[str, list[float]]:
    """Greedy tokens, and their log-probabilities in nats, after `prompt` in an empty cache."""
    model.reset()
    model.eval(prompt)
    tokens: list[int] = []
    logprobs: list[float] = []
    while len(tokens) < n_tokens:
        logits = np.ctypeslib.as_array(model._ctx.get_logits(), (model.n_vocab(),)).astype(np.float64)
        token = int(logits.argmax())
        if token == model.token_eos():
            break
        tokens.append(token)
        logprobs.append(float(logits[token] - np.logaddexp.reduce(logits)))
        model.eval([token])
    return {"tokens": tokens, "logprobs": logprobs}


if __name__ == "__main__":
    main()
