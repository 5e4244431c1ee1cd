"""Messages → tokens: rendered by a template, or without one a line each.

Must not know how long a prompt may be. `template` brings its own process.
"""

from __future__ import annotations

from typing import Final

from myllm.prompts.chat_template import AlternationError, ChatTemplate, Message
from myllm.prompts.pieces import pieces
from myllm.prompts.spans import SpecialTexts, guard, split
from myllm.tokenizer import Tokenizer

REASONING: Final = "<think>"
"""What opens a reasoning, see `engine/text.py`."""


def alternating(messages: list[Message]) -> list[Message]:
    """The messages with those of one role in a row, and of one speaker, joined by a blank line.

    Results of tools stay apart: each belongs to a call.
    """
    joined: list[Message] = []
    for message in messages:
        before = joined[-1] if joined else {}
        same = all(before.get(key) == message.get(key) for key in ("role", "name"))
        if same and message["role"] != "tool":
            joined[-1] = {**before, "content": f"{before['content']}\n\n{message['content']}"}
        else:
            joined.append(message)
    return joined


class Chat:
    """Makes tokens of messages, and remembers how it last did."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._spans: list[str] = []
        self.n_joined = 0
        """Messages that are part of the one before them."""

    def assemble(self, messages: list[Message]) -> list[int]:
        """The tokens of a conversation, in which messages of one role in a row are joined where the template
        insists on it. Raises BadDataError from the template.
        """
        joined = messages
        try:
            self._spans = _spans(messages, self._tokenizer, self._template)
        except AlternationError:
            joined = alternating(messages)
            if len(joined) == len(messages):
                raise
            self._spans = _spans(joined, self._tokenizer, self._template)
        self.n_joined = len(messages) - len(joined)
        return encode(self._spans, self._tokenizer)

    def ends_in_reasoning(self, last: Message) -> bool:
        """Templates of reasoning models write the mark themselves; a message that ends in it is none."""
        ends = self._template is not None and "".join(self._spans).rstrip().endswith(REASONING)
        return ends and not last["content"].rstrip().endswith(REASONING)


def _spans(messages: list[Message], tokenizer: Tokenizer, template: ChatTemplate | None) -> list[str]:
    if template is None:
        texts, sentinel = guard([m["content"] for m in messages], SpecialTexts(tokenizer.special_tokens), "")
        return split("\n".join(texts), sentinel)
    return template.render(
        messages,
        special_tokens=tokenizer.special_tokens,
        bos=tokenizer.bos_text,
        eos=tokenizer.eos_text,
    )


def encode(spans: list[str], tokenizer: Tokenizer) -> list[int]:
    """The tokens of spans of text, control tokens among them, behind `bos` where the model wants it."""
    special = tokenizer.special_tokens
    tokens = [
        token
        for span in spans
        for piece in pieces(span, special)
        for token in tokenizer.encode(piece, special=True)
    ]
    if tokenizer.add_bos and tokenizer.bos is not None and tokens[:1] != [tokenizer.bos]:
        tokens.insert(0, tokenizer.bos)
    return tokens
