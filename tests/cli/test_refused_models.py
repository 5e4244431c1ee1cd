"""A model that llama.cpp refuses is bad data, with llama.cpp's own reason: cold and in the daemon."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from .conftest import Run

pytestmark = pytest.mark.model
KEY = b"tokenizer.ggml.token_type"
ARRAY_OF_INT32 = b"\x09\0\0\0\x05\0\0\0"
ARRAY_OF_UINT32 = b"\x09\0\0\0\x04\0\0\0"


@pytest.fixture
def refused(smollm2_path: Path, tmp_path: Path) -> Path:
    """A whole model, but that its token types are of another integer type than llama.cpp wants."""
    path = tmp_path / "refused.gguf"
    shutil.copyfile(smollm2_path, path)
    with path.open("r+b") as file:
        head = file.read(4 * 2**20)
        at = head.index(KEY) + len(KEY)
        assert head[at : at + 8] == ARRAY_OF_INT32
        file.seek(at)
        file.write(ARRAY_OF_UINT32)
    return path


@pytest.mark.usefixtures("daemons")
@pytest.mark.parametrize("warm", [False, True])
def test_the_reason_is_in_the_line_and_no_worker_counts_as_crashed(
    run: Run, refused: Path, smollm2_path: Path, warm: bool
) -> None:
    if warm:
        run("load", smollm2_path)
    for _ in range(4):  # more often than a model may crash
        ended = run("gen", "-t", "-m", refused, "-n", "hi", *([] if warm else ["--no-daemon"]))
        assert ended.status == 65
        assert ended.err.count("\n") == 1
        assert f"{refused}: llama.cpp cannot load it: " in ended.err
        assert "token_type" in ended.err
