"""A worker's prompts: requests → tokens, with the chat template that the model or the request names.

Owns what a worker takes from its model's header, the templates in use, and how many renderer processes
stay for them. Must not know events, sockets or how an engine runs. Used by one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from myllm.engine import is_fake
from myllm.prompts.chat_template import ChatTemplate
from myllm.prompts.detect import find_template
from myllm.prompts.prepare import Prepared, prepare
from myllm.requests import GenRequest
from myllm.tokenizer import Tokenizer

MAX_TEMPLATES: Final = 4
"""Renderer processes kept at once; requests may name templates, and each has a process."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a model's file says of itself: whether it `writes`, and whether it was made to and not to embed;
    its chat template, the sampling parameters it asks for, and of an embedding model the usual window in
    tokens and the prefixes of queries and documents.
    """

    writes: bool = True
    is_made_for_text: bool = False
    template: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    window: int | None = None
    prefixes: Mapping[str, str] = field(default_factory=dict)


def read_model_file(path: Path) -> ModelFile:
    """Reads and checks the header, before llama.cpp sees the file. Raises BadDataError, NotFoundError."""
    if is_fake(path):
        from myllm.engine.fake_script import Script

        return ModelFile(template=Script.read(path).template)
    from myllm.models.gguf import read_header

    header = read_header(path)
    return ModelFile(
        header.causal,
        not header.is_embedding_model,
        header.template,
        header.sampling,
        header.embedding_window,
        header.embedding_prefixes,
    )


class Preparer:
    """Prompts for one model. With `start`, making one starts the renderer of the model's own template, which
    is not waited for."""

    def __init__(self, own_template: str | None, model: str, *, start: bool = True) -> None:
        self._own = own_template
        self._model = model
        self._templates: dict[str | None, ChatTemplate] = {}
        if start:
            self._template(None)

    def prepare(self, request: GenRequest, tokenizer: Tokenizer, window: int) -> Prepared:
        """The prompt's tokens. Raises ContextOverflowError, BadDataError from the template, UsageError."""
        return prepare(request, tokenizer, self._template(request.template), window)

    def count(self, request: GenRequest, tokenizer: Tokenizer) -> int:
        """How many tokens the prompt has, also where no window holds them."""
        return len(self.prepare(request, tokenizer, sys.maxsize).tokens)

    def _template(self, wanted: str | None) -> ChatTemplate:
        template = self._templates.pop(wanted, None)
        if template is None:
            source = find_template(self._own, self._model, wanted)
            if len(self._templates) >= MAX_TEMPLATES:
                longest_unused = next(name for name in self._templates if name is not None)
                self._templates.pop(longest_unused).close()
            template = ChatTemplate(source)
        self._templates[wanted] = template  # behind all that were used before it
        return template
