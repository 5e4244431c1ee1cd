"""A worker's prompts: requests → tokens, with the template that the request, the load or the model names.

Owns what a worker takes from its model's header, templates in files, those in use, and how many renderer
processes stay for them. Must not know events, sockets or how an engine runs. Used by one thread.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from myllm.engine import is_fake
from myllm.errors import BadDataError, NotFoundError
from myllm.prompts.chat_template import ChatTemplate
from myllm.prompts.detect import find_template
from myllm.prompts.prepare import Prepared, prepare
from myllm.requests import GenRequest
from myllm.tokenizer import Tokenizer

MAX_TEMPLATES: Final = 4
"""Renderer processes kept at once; requests may name templates, and each has a process."""
MAX_SOURCE: Final = 2**20
"""Bytes of a template's file, as of a text in a model's header; those in use have at most some 20,000."""


@dataclass(frozen=True, slots=True)
class ModelFile:
    """What a model's file says of itself: whether it `writes`, and whether it was made to and not to embed;
    its chat template and the named ones beside it, the sampling parameters it asks for, and of an embedding
    model the usual window in tokens and the prefixes of queries and documents.
    """

    writes: bool = True
    is_made_for_text: bool = False
    template: str | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
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
        header.templates,
        header.sampling,
        header.embedding_window,
        header.embedding_prefixes,
    )


def read_template(path: Path) -> str:
    """The source in a template's file. Raises NotFoundError, BadDataError."""
    try:
        if path.exists() and not path.is_file():  # a pipe, say, would keep all others waiting
            raise BadDataError(f"template: {path}: not a file; give the file of a template")
        with path.open("rb") as file:
            source = file.read(MAX_SOURCE + 1)
        if len(source) > MAX_SOURCE:
            raise BadDataError(f"template: {path}: more than {MAX_SOURCE:,} bytes, which no template has")
        return source.decode()
    except FileNotFoundError as error:
        raise NotFoundError(f"template: {path}: no such file") from error
    except OSError as error:
        raise BadDataError(f"template: {path}: {error.strerror}; give another file") from error
    except ValueError as error:
        raise BadDataError(f"template: {path}: not a text in UTF-8; give another file") from error


class Preparer:
    """Prompts for one model, by default with the template that is `wanted` for it, else with its own.

    Making one raises what `read_template` and `find_template` do. With `start`, it starts the renderer of the
    template that is usual, where that is known before the vocabulary is; it is not waited for.
    """

    def __init__(
        self, about: ModelFile, model: str, wanted: str | None = None, *, start: bool = True
    ) -> None:
        self._about = about
        self._model = model
        self._in_use: dict[str, ChatTemplate] = {}
        """By source, the one last used at the end."""
        self._usual: str | None = None
        """The source of the template for requests that name none."""
        if wanted or (about.template or "").strip():
            self._usual = self._source(wanted, ())
        if start and self._usual is not None:
            self._opened(self._usual)

    def prepare(self, request: GenRequest, tokenizer: Tokenizer, window: int) -> Prepared:
        """The prompt's tokens. Raises ContextOverflowError, BadDataError from the template, UsageError, and
        what `read_template` does.
        """
        return prepare(request, tokenizer, self._template(request.template, tokenizer), window)

    def count(self, request: GenRequest, tokenizer: Tokenizer) -> int:
        """How many tokens the prompt has, also where no window holds them."""
        return len(self.prepare(request, tokenizer, sys.maxsize).tokens)

    def _template(self, wanted: str | None, tokenizer: Tokenizer) -> ChatTemplate:
        if wanted is not None:
            return self._opened(self._source(wanted, tokenizer.special_tokens))
        if self._usual is None:
            self._usual = self._source(None, tokenizer.special_tokens)
        return self._opened(self._usual)

    def _source(self, wanted: str | None, vocabulary: Collection[str]) -> str:
        """A path is absolute, as clients send it, so that no name looks like one."""
        if wanted and wanted.startswith("/"):
            return read_template(Path(wanted))
        about = self._about
        return find_template(
            about.template, self._model, wanted, named=about.templates, vocabulary=vocabulary
        )

    def _opened(self, source: str) -> ChatTemplate:
        template = self._in_use.pop(source, None)
        if template is None:
            if len(self._in_use) >= MAX_TEMPLATES:
                longest_unused = next(each for each in self._in_use if each != self._usual)
                self._in_use.pop(longest_unused).close()
            template = ChatTemplate(source)
        self._in_use[source] = template
        return template
