"""The vocabulary of a BERT checkpoint, where its tokenizer is one that llama.cpp computes the same way.

Owns which WordPiece tokenizers those are: lower-case, accents stripped, CJK cut into characters
(llm_tokenizer_wpm_session in llama-vocab.cpp has no switch for any of it). Must not know files, nor how
a GGUF is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from myllm.errors import BadDataError

SPECIAL: Final = {
    "[PAD]": "padding_token_id",
    "[UNK]": "unknown_token_id",
    "[CLS]": "bos_token_id",
    "[SEP]": "seperator_token_id",
    "[MASK]": "mask_token_id",
}
"""The tokens a vocabulary must have → their key below `tokenizer.ggml.` (spelt as llama.cpp does)."""
CONTINUES: Final = "##"
BEGINS: Final = "\u2581"
FRAME: Final = ("[CLS]", "A", "[SEP]")
"""What stands around a text."""


def vocabulary(tokenizer: Mapping[str, Any], lines: Sequence[str] | None, n_vocab: int) -> tuple[str, ...]:
    """The tokens in order of ids; ids up to `n_vocab` that the tokenizer lacks are `[PAD<id>]`.

    `tokenizer` is a tokenizer.json; or, with the `lines` of a vocab.txt, a tokenizer_config.json.
    Raises BadDataError naming what llama.cpp would do differently.
    """
    if lines is None:
        _check_tokenizer(tokenizer)
        vocab = tokenizer["model"]["vocab"]
    else:
        _check_config(tokenizer)
        vocab = {token: number for number, token in enumerate(lines)}
        if len(vocab) < len(lines):
            raise BadDataError("checkpoint: vocab.txt has a token twice")
    ids = list(vocab.values())
    if not all(type(number) is int for number in ids) or sorted(ids) != list(range(len(ids))):
        raise BadDataError("checkpoint: the ids of its vocabulary are not 0, 1, 2, …")
    if len(ids) > n_vocab:
        raise BadDataError(f"checkpoint: {len(ids):,} tokens in its vocabulary, {n_vocab:,} in config.json")
    if missing := [token for token in SPECIAL if token not in vocab]:
        raise BadDataError(f"checkpoint: its vocabulary lacks {', '.join(missing)}")
    padding = (f"[PAD{number}]" for number in range(len(ids), n_vocab))
    tokens = (*sorted(vocab, key=vocab.__getitem__), *padding)
    spelt = set(map(phantom_space, tokens))
    if len(spelt) < len(tokens) or spelt & {"", BEGINS}:
        raise BadDataError("checkpoint: its vocabulary has a token twice, or one without text")
    return tokens


def phantom_space(token: str) -> str:
    """A token as llama.cpp's WordPiece wants it: what begins a word has a mark, what goes on has none."""
    if token.startswith("[") and token.endswith("]"):
        return token
    return token.removeprefix(CONTINUES) if token.startswith(CONTINUES) else BEGINS + token


def _check_tokenizer(tokenizer: Mapping[str, Any]) -> None:
    try:
        model, normalizer = tokenizer["model"], tokenizer["normalizer"]
        said = {
            "model": model.get("type", "WordPiece"),
            "unk_token": model["unk_token"],
            "continuing_subword_prefix": model["continuing_subword_prefix"],
            "normalizer": normalizer["type"],
            "lowercase": normalizer["lowercase"],
            "strip_accents": normalizer.get("strip_accents") in (None, True),  # None: as lowercase
            "handle_chinese_chars": normalizer.get("handle_chinese_chars", True),
            "clean_text": normalizer.get("clean_text", True),
            "pre_tokenizer": tokenizer["pre_tokenizer"]["type"],
            "post_processor": _frame(tokenizer["post_processor"]),
        }
        vocab = model["vocab"]
        added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        wrong = [token for token, number in added.items() if token not in SPECIAL or vocab[token] != number]
    except (LookupError, TypeError, AttributeError) as error:
        raise BadDataError("checkpoint: tokenizer.json is not one of BERT's") from error
    _expect(
        said,
        model="WordPiece",
        unk_token="[UNK]",  # noqa: S106 — no password
        continuing_subword_prefix=CONTINUES,
        normalizer="BertNormalizer",
        lowercase=True,
        strip_accents=True,
        handle_chinese_chars=True,
        clean_text=True,
        pre_tokenizer="BertPreTokenizer",
        post_processor=FRAME,
    )
    if wrong:
        raise BadDataError(f"checkpoint: tokens added to the tokenizer are not known, {wrong[0]!r:.80} first")
    if not isinstance(vocab, dict):
        raise BadDataError("checkpoint: tokenizer.json is not one of BERT's")


def _frame(processor: Mapping[str, Any]) -> Any:
    """What stands around a text, by either of the processors that say it."""
    if processor["type"] == "BertProcessing":
        return (processor["cls"][0], "A", processor["sep"][0])
    if processor["type"] == "TemplateProcessing":
        return tuple(piece["id"] for each in processor["single"] for piece in each.values())
    return processor["type"]


def _check_config(config: Mapping[str, Any]) -> None:
    """BertTokenizer's own defaults stand for what a tokenizer_config.json leaves out."""
    said = {
        "tokenizer_class": str(config.get("tokenizer_class", "BertTokenizer")).removesuffix("Fast"),
        "do_lower_case": config.get("do_lower_case", True),
        "strip_accents": config.get("strip_accents") in (None, True),
        "tokenize_chinese_chars": config.get("tokenize_chinese_chars", True),
        "do_basic_tokenize": config.get("do_basic_tokenize", True),
    }
    _expect(
        said,
        tokenizer_class="BertTokenizer",
        do_lower_case=True,
        strip_accents=True,
        tokenize_chinese_chars=True,
        do_basic_tokenize=True,
    )


def _expect(said: Mapping[str, Any], **known: Any) -> None:
    for key, value in known.items():
        if type(said[key]) is not type(value) or said[key] != value:
            raise BadDataError(
                f"checkpoint: tokenizer with {key} {said[key]!r:.80} is not known; {value!r} is"
            )
