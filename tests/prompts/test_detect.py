"""Which template a model gets, and that the shipped ones render as their models' authors document."""

from __future__ import annotations

import pytest

from myllm.errors import UsageError
from myllm.prompts.detect import BY_MODEL, BY_VOCABULARY, DEFAULT, NAMES, find_template

SYSTEM = {"role": "system", "content": "You are a helpful assistant"}
TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi there"},
    {"role": "user", "content": "Who are you"},
]
# The renderings of llama.cpp's tests/test-chat-template.cpp, cut to three turns. A template that refuses the
# system role gets it with one newline, as llama.cpp's Jinja path does.
KNOWN = {
    "chatml": "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    "<|im_start|>assistant\nHi there<|im_end|>\n<|im_start|>user\nWho are you<|im_end|>\n"
    "<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nYou are a helpful assistant<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHi there<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWho are you<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "gemma": "<s><start_of_turn>user\nYou are a helpful assistant\nHello<end_of_turn>\n<start_of_turn>model\n"
    "Hi there<end_of_turn>\n<start_of_turn>user\nWho are you<end_of_turn>\n<start_of_turn>model\n",
    "mistral": "<s>[INST] You are a helpful assistant\nHello [/INST] Hi there</s>[INST] Who are you [/INST]",
    "phi3": "<|system|>\nYou are a helpful assistant<|end|>\n<|user|>\nHello<|end|>\n"
    "<|assistant|>\nHi there<|end|>\n<|user|>\nWho are you<|end|>\n<|assistant|>\n",
    "zephyr": "<|system|>\nYou are a helpful assistant</s>\n<|user|>\nHello</s>\n"
    "<|assistant|>\nHi there</s>\n<|user|>\nWho are you</s>\n<|assistant|>\n",
    "vicuna": "You are a helpful assistant\n\nUSER: Hello\nASSISTANT: Hi there</s>\n"
    "USER: Who are you\nASSISTANT:",
    # Stanford Alpaca's prompt; its own preamble is the system message.
    "alpaca": "You are a helpful assistant\n\n### Instruction:\nHello\n\n### Response:\nHi there</s>\n\n"
    "### Instruction:\nWho are you\n\n### Response:\n",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_template_renders_as_documented(name: str, open_template) -> None:
    template = open_template(find_template(None, "", name))
    assert template.render([SYSTEM, *TURNS], bos="<s>", eos="</s>") == [KNOWN[name]]


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Meta-Llama-3.1-8B-Instruct", "llama3"),
        ("gemma-2-2b-it", "gemma"),
        ("Mistral-7B-Instruct-v0.2", "mistral"),
        ("OpenHermes-2.5-Mistral-7B", "chatml"),
        ("zephyr-7b-beta", "zephyr"),
        ("Phi-3-mini-4k-instruct", "phi3"),
        ("SmolLM2-135M-Instruct", "chatml"),
        ("something new", DEFAULT),
    ],
)
def test_a_file_without_template_gets_the_one_for_its_name(model: str, name: str) -> None:
    assert find_template(None, model) == find_template(None, "", name)
    assert find_template("  ", model) == find_template(None, "", name)


def test_the_files_own_template_wins_over_its_name() -> None:
    assert find_template("{{ messages }}", "gemma") == "{{ messages }}"


def test_a_template_asked_for_wins_over_the_files_own() -> None:
    assert find_template("{{ messages }}", "x", "zephyr") == find_template(None, "zephyr")


def test_a_file_may_hold_a_templates_name_instead_of_its_source() -> None:
    assert find_template("gemma", "x") == find_template(None, "", "gemma")


@pytest.mark.parametrize(("token", "name"), BY_VOCABULARY)
def test_a_vocabulary_says_more_than_a_name(token: str, name: str) -> None:
    """Fine-tunes keep their family's name and change its format."""
    assert find_template(None, "vicuna", vocabulary=["<s>", token]) == find_template(None, "", name)
    assert find_template(None, "vicuna", vocabulary=["<s>", "</s>"]) == find_template(None, "", "vicuna")
    assert find_template("{{ messages }}", "x", vocabulary=[token]) == "{{ messages }}"


def test_one_of_the_files_named_templates_can_be_asked_for() -> None:
    named = {"tool_use": "{{ tools }}", "chatml": "its own chatml"}
    assert find_template("{{ messages }}", "x", "tool_use", named=named) == "{{ tools }}"
    assert find_template("{{ messages }}", "x", "chatml", named=named) == "its own chatml"
    assert find_template("{{ messages }}", "x", named=named) == "{{ messages }}"


def test_an_unknown_name_is_refused_with_the_nearest_and_all_known_ones() -> None:
    with pytest.raises(UsageError, match=r"no template 'nope'; there are alpaca, chatml"):
        find_template(None, "x", "nope")
    with pytest.raises(UsageError, match=r"'tooluse'; did you mean tool_use\? there are tool_use, alpaca"):
        find_template(None, "x", "tooluse", named={"tool_use": ""})


def test_every_detected_template_is_shipped() -> None:
    assert {name for _, name in (*BY_MODEL, *BY_VOCABULARY)} | {DEFAULT} <= set(NAMES)
