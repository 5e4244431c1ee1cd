"""One prompt: what `gen` asks, prints and says, on scripted models."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

import myllm.client
from myllm.cli import myllm as root
from myllm.errors import UnavailableError

from .conftest import MYLLM, Captured, Run, on_a_terminal

FakeModel = Callable[..., Path]


def test_a_pipe_gets_the_stream_and_its_tokens_join_to_the_text(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "-m", fake_model(), "--seed", 7, stdin=b"Why do Unix pipes matter?\n")
    assert ended.status == 0
    assert ended.err == ""
    *tokens, done = ended.lines
    assert all(list(token) == ["token", "done"] and token["done"] is False for token in tokens)
    assert "".join(token["token"] for token in tokens) == done["full_text"] == "Why do Unix pipes matter?"
    assert list(done) == ["done", "full_text", "model", "finish_reason", "usage", "timings", "seed"]
    assert done["done"] is True
    assert done["seed"] == 7


def test_stdin_comes_before_the_prompt(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "-t", "-m", fake_model(), "Sum up.", stdin=b"The text.\n")
    assert ended.out == b"The text.\n\nSum up.\n"


def test_a_placed_text_and_no_stdin(run: Run, fake_model: FakeModel) -> None:
    model = fake_model()
    assert run("gen", "-t", "-m", model, "<{}>", stdin=b"x\n").out == b"<x>\n"
    assert run("gen", "-t", "-n", "-m", model, "<{}>", stdin=b"x\n").out == b"<{}>\n"


def test_two_gens_in_a_pipe_pass_the_answer_on(run: Run, fake_model: FakeModel) -> None:
    first = run("gen", "-m", fake_model(tokens=["an", "swer"]), "hi")
    second = run("gen", "-t", "-m", fake_model(), stdin=first.out)
    assert second.out == b"answer\n"


def test_an_error_passes_through_a_pipe_and_is_1(run: Run, fake_model: FakeModel) -> None:
    first = run("gen", "-m", "nosuch", "hi")
    assert first.status == 66
    assert first.lines[-1]["error"]["code"] == "not_found"
    second = run("gen", "-m", fake_model(), stdin=first.out)
    assert second.status == 1
    assert second.out == first.out
    assert "the command before failed" in second.err


def test_parameters_reach_the_model(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["a", "b", "c", "d"])
    assert run("gen", "-t", "-m", model, "--max-tokens", 2, "hi").out == b"ab\n"
    assert run("gen", "-t", "-m", model, "--stop", "c", "hi").out == b"ab\n"
    ended = run("gen", "-m", model, "--logprobs", 1, "hi")
    assert ended.lines[0]["top_logprobs"]


def test_length_is_a_success(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "-m", fake_model(), "--max-tokens", 1, "a b c")
    assert ended.status == 0
    assert ended.lines[-1]["finish_reason"] == "length"


def test_a_deadline_is_124_and_keeps_what_there_is(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["x "] * 1000, ms_per_token=20)
    ended = run("gen", "-t", "-m", model, "--deadline", "1500ms", "hi")
    assert ended.status == 124
    assert ended.out.startswith(b"x x")
    assert ended.out.endswith(b"\n")
    assert ended.err.startswith("myllm: deadline:")


def test_a_prompt_over_the_window_is_67_and_has_both_numbers(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "-m", fake_model(window=16), stdin=b" word" * 100)
    assert ended.status == 67
    assert "100" in ended.err
    assert "16" in ended.err
    assert [event["done"] for event in ended.lines] == [True]


def test_what_was_cut_is_said(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "-t", "-m", fake_model(window=16), "--on-overflow", "head", stdin=b"word " * 100)
    assert ended.status == 0
    assert "tokens left out" in ended.err


def test_turns_that_were_left_out_are_counted_and_said(run: Run, fake_model: FakeModel) -> None:
    lines = [{"role": role, "content": " word" * 5} for _ in range(8) for role in ("user", "assistant")][:-1]
    stdin = b"\n".join(map(orjson.dumps, lines))
    ended = run("gen", "-m", fake_model(window=40), "--on-overflow", "turns", stdin=stdin)
    assert ended.status == 0
    dropped = ended.lines[-1]["usage"]["dropped_messages"]
    assert dropped % 2 == 0
    assert 8 <= dropped <= 12
    assert ended.err == f"myllm: prompt: {dropped} messages left out so that it fits the window\n"


def test_joined_messages_are_said_to_who_asks(run: Run, fake_model: FakeModel) -> None:
    refusing = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    model = fake_model(template=refusing + "{{ messages[0].content }}")
    stdin = b'{"role":"user","content":"a"}\n{"role":"user","content":"b"}\n'
    ended = run("gen", "-t", "-m", model, stdin=stdin)
    assert ended.out == b"a\n\nb\n"
    assert ended.err == ""
    told = run("gen", "-t", "-v", "-m", model, stdin=stdin).err
    assert "prompt: 1 of the messages joined to the one before" in told


def test_a_template_is_a_name_or_a_file(run: Run, fake_model: FakeModel, tmp_path: Path) -> None:
    """A relative path is the command's, whose folder is not the worker's."""
    model = fake_model()
    assert b"### Instruction:\nhi" in run("gen", "-t", "-m", model, "--template", "alpaca", "hi").out
    (tmp_path / "mine.jinja").write_text("<{{ messages[0].content }}>")
    for name in ("mine.jinja", "./mine.jinja"):
        ended = run("gen", "-t", "-m", model, "--template", name, "hi", cwd=tmp_path)
        assert ended.out == b"<hi>\n"
    mapped = run(
        "gen", "--map", "{}!", "-t", "-m", model, "--template", tmp_path / "mine.jinja", stdin=b"hi\n"
    )
    assert mapped.out == b"<hi!>\n"


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (("--template", "chatlm"), 2, "no template 'chatlm'; did you mean chatml? there are alpaca, chatml"),
        (("--template", "./none.jinja"), 66, "none.jinja: no such file"),
        (("--template", "/"), 65, "/: not a file"),
        (("--template", "chatml", "--raw"), 2, "raw is without a template"),
    ],
)
def test_a_template_that_is_none_is_refused(
    arguments: tuple[str, ...], status: int, why: str, run: Run, fake_model: FakeModel
) -> None:
    ended = run("gen", "-t", "-m", fake_model(), *arguments, "hi")
    assert ended.status == status
    assert why in ended.err


def test_count_runs_nothing(run: Run, fake_model: FakeModel) -> None:
    model = fake_model()
    assert run("gen", "--count", "-t", "-m", model, "one two three").out == b"3\n"
    (record,) = run("gen", "--count", "-m", model, "one two three").lines
    assert record["usage"]["prompt_tokens"] == 3


def test_statistics_are_one_line_on_stderr(run: Run, fake_model: FakeModel) -> None:
    ended = run("gen", "-v", "-t", "-m", fake_model(), "--seed", 3, "one two")
    assert ended.out == b"one two\n"
    assert "2 prompt tokens (0 cached), 2 tokens at" in ended.err
    assert ended.err.count("\n") == 1


def test_a_worker_that_dies_is_69_with_its_last_words(run: Run, fake_model: FakeModel) -> None:
    fault = {"kind": "abort", "after_tokens": 2, "words": "GGML_ASSERT failed"}
    ended = run("gen", "-m", fake_model(tokens=["a", "b", "c"], fault=fault), "hi")
    assert ended.status == 69
    assert "GGML_ASSERT failed" in ended.err
    assert ended.lines[0] == {"token": "a", "done": False}
    assert ended.lines[-1]["error"]["code"] == "worker_crashed"
    assert [event["done"] for event in ended.lines].count(True) == 1


def test_a_partial_text_keeps_its_line_before_the_error(run: Run, fake_model: FakeModel) -> None:
    fault = {"kind": "kill", "after_tokens": 2}
    ended = run("gen", "-t", "-m", fake_model(tokens=["a", "b", "c"], fault=fault), "hi")
    assert (ended.status, ended.out) == (69, b"ab\n")


@pytest.mark.parametrize(
    ("stdin", "status", "said"),
    [
        (b"caf\xe9 au lait", 65, "at byte 3"),
        (b"", 2, "empty, and no prompt"),
        (b"\n", 2, "empty, and no prompt"),
        (b'{"token":"x","done":false}\n', 65, "cut off"),
    ],
)
def test_a_bad_stdin_is_refused(
    run: Run, fake_model: FakeModel, stdin: bytes, status: int, said: str
) -> None:
    ended = run("gen", "-m", fake_model(), stdin=stdin)
    assert ended.status == status
    assert not ended.out
    assert said in ended.err


def test_a_conversation_on_stdin(run: Run, fake_model: FakeModel) -> None:
    turns = [{"role": "user", "content": "one "}, {"role": "assistant", "content": "two "}]
    stdin = b"".join(orjson.dumps(turn) + b"\n" for turn in turns)
    assert run("gen", "-t", "-m", fake_model(), "three", stdin=stdin).out == b"one two three\n"


def test_the_environment_and_the_flags_choose_the_output(
    run: Run, fake_model: FakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MYLLM_MODEL", str(fake_model(tokens=["hi"])))
    monkeypatch.setenv("MYLLM_OUTPUT", "text")
    assert run("gen", "x").out == b"hi\n"
    assert run("gen", "x", "-o", "jsonl").out.startswith(b'{"token":"hi"')


def test_a_relative_path_to_a_model_works(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["hi"])
    assert run("gen", "x", "-t", "-m", f"./{model.name}", cwd=model.parent).out == b"hi\n"


def test_a_terminal_gets_text_with_its_controls_escaped(fake_model: FakeModel) -> None:
    model = fake_model(tokens=["\x1b", "]52;c;eA==\x07", "\x9bhi\x7f"])
    shown = on_a_terminal("gen", "x", "-m", model, "--no-progress")
    assert shown == "\\x1b]52;c;eA==\\x07\\x9bhi\\x7f\n"


def test_a_load_is_shown_as_a_bar_on_a_terminal_and_taken_away(fake_model: FakeModel) -> None:
    model = fake_model(tokens=["hi"], load_ms=600)
    shown = on_a_terminal("gen", "x", "-m", model)
    assert "loading" in shown
    assert shown.endswith("hi\n")


def test_progress_never_reaches_stdout(run: Run, fake_model: FakeModel) -> None:
    model = fake_model(tokens=["hi"], load_ms=600)
    ended = run("gen", "x", "-m", model, "--progress")
    assert "loading" in ended.err
    assert b"loading" not in ended.out
    assert run("gen", "x", "-m", model).err == ""


def test_a_silent_stdin_is_said_after_two_seconds(fake_model: FakeModel) -> None:
    with subprocess.Popen(
        [*MYLLM, "gen", "-t", "-m", str(fake_model())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stderr
        assert b"waiting for text on stdin" in process.stderr.readline()
        assert process.communicate(b"late\n")[0] == b"late\n"


class VanishingClient:
    """A connection that ends after two tokens."""

    def __enter__(self) -> VanishingClient:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def stream(self, request: dict[str, Any]) -> Iterator[bytes]:
        yield b'{"token":"a","done":false}'
        yield b'{"token":"b","done":false}'
        raise UnavailableError("runtime: the connection is gone")


@pytest.mark.parametrize(
    ("output", "printed"),
    [
        ("text", b"ab\n"),
        (
            "jsonl",
            b'{"token":"a","done":false}\n{"token":"b","done":false}\n'
            b'{"done":true,"error":{"code":"unavailable","message":"runtime: the connection is gone"}}\n',
        ),
    ],
)
def test_a_connection_that_vanishes_leaves_a_stream_with_its_last_line(
    captured: Callable[..., Captured], monkeypatch: pytest.MonkeyPatch, output: str, printed: bytes
) -> None:
    monkeypatch.setattr(myllm.client, "connect", lambda settings, note: VanishingClient())
    files = captured()
    with (
        root.make_context("myllm", ["gen", "hi", "-n", "-o", output], obj=files.streams) as context,
        pytest.raises(UnavailableError),
    ):
        root.invoke(context)
    assert files.out == printed
