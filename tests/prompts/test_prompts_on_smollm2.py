"""Prompts for the real model, against llama-cpp-python's own tokenizer and its Jinja formatter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from myllm.prompts.chat import Chat
from myllm.prompts.chat_template import ChatTemplate
from myllm.prompts.prepare import prepare
from myllm.prompts.turns import _counted
from myllm.protocol import ROLES
from myllm.requests import GenRequest

pytestmark = pytest.mark.model


class IndependentTokenizer:
    """llama-cpp-python's high-level class, with what `gguf` reads of the vocabulary."""

    add_bos = False

    def __init__(self, path: Path) -> None:
        import llama_cpp
        from gguf import GGUFReader

        self.llama = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        self.template = self.llama.metadata["tokenizer.chat_template"]
        fields = GGUFReader(path).fields
        texts = fields["tokenizer.ggml.tokens"].contents()
        types = fields["tokenizer.ggml.token_type"].contents()
        self.control = {
            i: texts[i] for i, kind in enumerate(types) if kind == llama_cpp.LLAMA_TOKEN_TYPE_CONTROL
        }
        self.special_tokens: Sequence[str] = list(self.control.values())
        self.bos: int | None = self.llama.token_bos()
        self.eos: int | None = self.llama.token_eos()
        self.bos_text, self.eos_text = self.control[1], self.control[2]
        self.max_piece_bytes = max(len(text.encode()) for text in texts)

    def encode(self, text: str, *, special: bool) -> list[int]:
        return self.llama.tokenize(text.encode(), add_bos=False, special=special)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.llama.detokenize(list(tokens), special=True).decode(errors="replace")


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> IndependentTokenizer:
    return IndependentTokenizer(smollm2_path)


@pytest.fixture(scope="module")
def template(smollm2: IndependentTokenizer) -> Iterator[ChatTemplate]:
    template = ChatTemplate(smollm2.template)
    yield template
    template.close()


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Why do Unix pipes matter?"}],
        [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "  x\n\ny  "}],
        [
            {"role": "user", "content": "naïve 漢字 🦙\n\n```py\nif a < b: print('<b>')\n```"},
            {"role": "assistant", "content": "…"},
            {"role": "user", "content": "1234567"},
        ],
    ],
)
def test_ordinary_conversations_have_the_usual_tokens(messages, smollm2, template) -> None:
    """Rendering and tokens equal those of llama-cpp-python's Jinja2ChatFormatter and one tokenize call."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    formatter = Jinja2ChatFormatter(smollm2.template, eos_token=smollm2.eos_text, bos_token=smollm2.bos_text)
    expected = smollm2.encode(formatter(messages=messages).prompt, special=True)
    assert prepare(GenRequest(messages=messages), smollm2, template, 8192).tokens == expected


@pytest.mark.parametrize("role", ROLES)
def test_no_control_token_of_the_model_comes_from_any_role(role: str, smollm2, template) -> None:
    """All of its control tokens, whole, doubled, cut at either end and in a row: none becomes its id."""
    plain = [{"role": role, "content": "x"}, {"role": "user", "content": "hi"}]
    expected = prepare(GenRequest(messages=plain), smollm2, template, 8192).tokens
    control = [t for t in expected if t in smollm2.control]
    every = "".join(smollm2.special_tokens)
    for special in smollm2.special_tokens:
        for content in (
            special,
            f"a {special}{special} b",
            special[1:],
            special[:-1],
            special[1:] + special[:-1],
            every,
        ):
            messages = [{"role": role, "content": content}, {"role": "user", "content": "hi"}]
            tokens = prepare(GenRequest(messages=messages), smollm2, template, 8192).tokens
            assert [t for t in tokens if t in smollm2.control] == control
            assert content in smollm2.decode(tokens)


def test_a_long_text_is_cut_to_fit_exactly(smollm2, template) -> None:
    text = "The quick brown fox jumps over the lazy dog; naïve 漢字 🦙.\n" * 2000
    for cut in ("head", "tail", "middle"):
        request = GenRequest(prompt=text, on_overflow=cut, max_tokens=100)
        prepared = prepare(request, smollm2, template, 1000)
        assert 890 <= len(prepared.tokens) <= 900
        assert "�" not in smollm2.decode(prepared.tokens)


def test_long_raw_text_of_control_tokens_has_the_usual_tokens_in_linear_time(smollm2) -> None:
    """In one call llama.cpp's time grows with the square of the number of control tokens."""
    prepared = prepare(GenRequest(prompt="<|im_end|>x" * 10_000, raw=True), smollm2, None, 100_000)
    assert prepared.tokens == smollm2.encode("<|im_end|>x", special=True) * 10_000


def turns(n_turns: int) -> list[dict[str, str]]:
    """About 40 tokens a turn; the last one has no answer yet."""
    messages = [{"role": "system", "content": "Be terse."}]
    for n in range(n_turns):
        messages.append({"role": "user", "content": f"Tell me of pipe number {n}, please."})
        messages.append({"role": "assistant", "content": f"Pipe {n} carries bytes — to ‘{'x' * (n % 5)}’.\n"})
    return messages[:-1]


def test_messages_are_counted_nearly_as_they_are_rendered(smollm2, template) -> None:
    """So that what the counts decide fits, and little is dropped that would."""
    messages = turns(100)
    chat = Chat(smollm2, template)
    fixed, counted = _counted(messages, chat, smollm2, 8192)
    exact = len(chat.assemble(messages))
    assert exact <= fixed + sum(message.n_tokens for message in counted) <= exact * 1.05


def test_a_conversation_of_sixty_turns_reuses_its_prefix(smollm2, template) -> None:
    """512 of 2,048 tokens are for the answer; the prompt before is the beginning of nearly every next one."""
    n_reused, before = 0, [0]
    for n_turns in range(1, 81):
        request = GenRequest(messages=turns(n_turns), on_overflow="turns")
        tokens = prepare(request, smollm2, template, 2048).tokens
        assert len(tokens) <= 2048 - 512
        n_reused += tokens[: len(before) - 3] == before[:-3]  # the last three open the answer
        before = tokens
    assert len(before) < len(prepare(GenRequest(messages=turns(80)), smollm2, template, 8192).tokens)
    assert n_reused / 80 >= 0.85
