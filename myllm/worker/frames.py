"""A worker's embed requests: texts → windows of tokens, for the engine.

Owns which texts have an error of their own. Must not know sockets or how an engine embeds.
"""

from __future__ import annotations

from myllm.engine import Engine, TextWindow
from myllm.errors import BadDataError, ContextOverflowError, MyllmError, UsageError
from myllm.events import no_vector
from myllm.prompts.windows import Window, cut
from myllm.protocol import Message
from myllm.requests import EmbedRequest
from myllm.worker.templates import ModelFile


def windows_of(
    request: EmbedRequest, engine: Engine, about: ModelFile
) -> tuple[list[list[TextWindow]], list[Message]]:
    """Each text's windows with the model's own tokens, and the events of texts that have none.

    Raises UsageError for a window that the model does not take.
    """
    tokenizer, limit = engine.tokenizer, engine.embed_window
    if request.window is not None and request.window > limit:
        raise UsageError(f"window: {request.window:,} tokens, and the model takes {limit:,}")
    head = [tokenizer.bos] if tokenizer.add_bos and tokenizer.bos is not None else []
    if request.purpose and (prefix := about.prefixes.get(request.purpose)):
        head += tokenizer.encode(prefix, special=False)
    tail = [] if tokenizer.closing is None else [tokenizer.closing]
    window = request.window or min(about.window or limit, limit)
    room = window - len(head) - len(tail)
    if room < 1 or request.overlap >= room:
        raise UsageError(
            f"window: {window:,} tokens hold {room:,} of a text, and {request.overlap:,} are to overlap; "
            "give a larger --window"
        )
    texts: list[list[TextWindow]] = []
    failures: list[Message] = []
    for item, text in enumerate(request.texts):
        try:
            whole = list(cut(text, room, request.overlap, lambda part: tokenizer.encode(part, special=False)))
            _check(whole, len(head) + len(tail), window, request.on_overflow)
        except MyllmError as error:
            failures.append(no_vector(item, error))
            whole = []
        texts.append([TextWindow(start, end, [*head, *tokens, *tail]) for start, end, tokens in whole])
    return texts, failures


def _check(windows: list[Window], n_around: int, limit: int, on_overflow: str) -> None:
    if len(windows) > 1 and on_overflow == "error":
        n_tokens = sum(len(window.tokens) for window in windows) + n_around
        raise ContextOverflowError(
            f"text: about {n_tokens:,} tokens, the window holds {limit:,}; shorten it, or let it be cut"
        )
    for window in windows:
        n_tokens = len(window.tokens) + n_around
        if not n_tokens:
            raise BadDataError("text: empty, and this model makes no vector of nothing")
        if n_tokens > limit:
            raise ContextOverflowError(
                f"text: a character of {n_tokens:,} tokens, the window holds {limit:,}"
            )
