"""Which chat template a model gets: one asked for by name, its own, or one by its vocabulary or name.

Owns the named templates in `templates/`. Knows no GGUF and no Jinja: in come strings, out comes source.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from importlib import resources
from types import MappingProxyType
from typing import Final

from myllm.errors import UsageError

DEFAULT: Final = "chatml"
NAMES: Final = ("alpaca", "chatml", "gemma", "llama3", "mistral", "phi3", "vicuna", "zephyr")
BY_VOCABULARY: Final = (
    ("<|start_header_id|>", "llama3"),
    ("<start_of_turn>", "gemma"),
    ("<|im_start|>", "chatml"),
    ("[INST]", "mistral"),
)
"""Control tokens that belong to one format; a vocabulary of several has the first."""
BY_MODEL: Final = (
    # First match wins: a fine-tune's own name stands before that of the family it comes from.
    (re.compile(r"zephyr|stablelm", re.I), "zephyr"),
    (re.compile(r"vicuna|wizardlm", re.I), "vicuna"),
    (re.compile(r"alpaca", re.I), "alpaca"),
    (re.compile(r"hermes|dolphin|qwen|smollm|orca|yi-", re.I), "chatml"),
    (re.compile(r"gemma", re.I), "gemma"),
    (re.compile(r"phi[-_ ]?3", re.I), "phi3"),
    (re.compile(r"llama[-_ ]?3", re.I), "llama3"),
    (re.compile(r"mistral|mixtral", re.I), "mistral"),
)
"""Model names, for files without a template and without such tokens: what their authors document as the
prompt format."""
LONGEST: Final = 80
"""Characters of a name that similar ones are looked for by."""
NONE: Final[Mapping[str, str]] = MappingProxyType({})


def find_template(
    own: str | None,
    model: str,
    wanted: str | None = None,
    *,
    named: Mapping[str, str] = NONE,
    vocabulary: Collection[str] = (),
) -> str:
    """The source of the template for a `model` whose file holds `own`, and beside it the `named` ones.

    `wanted` is the name of one of those or of a shipped template and wins. `own` may be such a name too: some
    files hold `chatml` where the template belongs. `vocabulary` are the texts of the control tokens. Raises
    UsageError where `wanted` is not known.
    """
    if wanted is not None:
        return _called(wanted, named)
    if own is None or not own.strip():
        return _shipped(_for_vocabulary(vocabulary) or _for_name(model))
    return _shipped(own.strip()) if own.strip() in NAMES else own


def _called(wanted: str, named: Mapping[str, str]) -> str:
    if wanted in named:
        return named[wanted]
    if wanted in NAMES:
        return _shipped(wanted)
    from difflib import get_close_matches

    known = [*named, *NAMES]
    near = get_close_matches(wanted[:LONGEST], known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UsageError(f"template: no template {wanted!r:.80}; {hint}there are {', '.join(known)}")


def _for_vocabulary(vocabulary: Collection[str]) -> str | None:
    return next((template for token, template in BY_VOCABULARY if token in vocabulary), None)


def _for_name(model: str) -> str:
    return next((template for pattern, template in BY_MODEL if pattern.search(model)), DEFAULT)


def _shipped(name: str) -> str:
    return (resources.files(__package__) / "templates" / f"{name}.jinja").read_text("utf-8")
