"""Which chat template a model gets: one asked for by name, its own, one for its name, else ChatML.

Owns the named templates in `templates/`. Knows no GGUF and no Jinja: in come strings, out comes source.
"""

from __future__ import annotations

import re
from importlib import resources
from typing import Final

from myllm.errors import UsageError

DEFAULT: Final = "chatml"
NAMES: Final = ("alpaca", "chatml", "gemma", "llama3", "mistral", "phi3", "vicuna", "zephyr")
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
"""Model names, for files without a template: what their authors document as the prompt format."""


def find_template(own: str | None, name: str, wanted: str | None = None) -> str:
    """The source of the template for a model called `name` whose file holds `own`.

    `wanted` is the name of a shipped template and wins. `own` may be such a name too: some files
    hold `chatml` where the template belongs. Raises UsageError where `wanted` is not known.
    """
    if wanted is not None and wanted not in NAMES:
        raise UsageError(f"template: no template {wanted!r:.80}; one of {', '.join(NAMES)}")
    if wanted is None and own is not None and own.strip():
        if own.strip() not in NAMES:
            return own
        wanted = own.strip()
    return _source(wanted or _named_for(name))


def _named_for(model: str) -> str:
    return next((template for pattern, template in BY_MODEL if pattern.search(model)), DEFAULT)


def _source(name: str) -> str:
    return (resources.files(__package__) / "templates" / f"{name}.jinja").read_text("utf-8")
