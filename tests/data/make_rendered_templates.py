"""Makes `llama_cpp_templates.tar.xz` and `rendered_templates.json`: how others render llama.cpp's templates.

The templates are those of llama.cpp's source (models/templates, as llama-cpp-python ships it), which is under
the MIT licence; each is its model's own, under that model's. A rendering is that of transformers; where that
fails, of llama.cpp, by `make_rendered_templates.cpp`; "refused" where the template itself refuses the
messages. Of each only its length in characters and the start of its SHA-256 are kept. Made once, in a folder
of its own, where DATA is this one:

    python -m venv venv && venv/bin/pip install transformers==5.24.0 jinja2==3.1.6 scikit-build-core
    venv/bin/pip download --no-deps --no-binary :all: --no-build-isolation llama-cpp-python==0.3.36
    tar xzf llama_cpp_python-0.3.36.tar.gz && cd llama_cpp_python-0.3.36/vendor/llama.cpp
    g++ -std=c++17 -I common -I vendor -I ggml/include -I include DATA/make_rendered_templates.cpp \\
        common/jinja/*.cpp common/json.cpp common/unicode.cpp -o render
    ../../../venv/bin/python DATA/make_rendered_templates.py models/templates ./render
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tarfile
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError, UndefinedError
from transformers.utils import chat_template_utils

DATA = Path(__file__).parent
NOW = datetime(2025, 7, 4, 12, 0)
CONVERSATIONS = [
    [{"role": "user", "content": "Why do Unix pipes matter?"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "  Two\n\nlines, and spaces \n"},
    ],
    [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nFour.\n</think>\n\n4"},
        {"role": "user", "content": "And 3 + 3?"},
    ],
    [{"role": "user", "content": "first"}, {"role": "user", "content": "second"}],
    [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2,"}],
    [
        {"role": "user", "content": "How warm is it?"},
        {"role": "assistant", "content": "I look."},
        {"role": "tool", "content": '{"celsius": 3}'},
        {"role": "assistant", "content": "3 degrees."},
        {"role": "user", "content": "Thanks."},
    ],
    [{"role": "user", "content": '🦙 漢字 <b> & "q" {{ x }} {% y %} \\n <|im_end|>', "name": "Ada"}],
]


class Clock(datetime):
    """So that templates which tell the date always tell the same."""

    @classmethod
    def now(cls, tz: object = None) -> datetime:
        return NOW


def rendered(file: Path, messages: list[dict[str, str]], program: str) -> str:
    """A line about the rendering: whose it is, its length and the start of its hash."""
    variables = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    try:
        (text,), _ = chat_template_utils.render_jinja_template(
            [messages], chat_template=file.read_text(), **variables
        )
        whose = "transformers"
    except (UndefinedError, TypeError):
        request = json.dumps({"messages": messages, **variables})
        ended = subprocess.run([program, file], input=request, capture_output=True, text=True, check=False)
        if ended.returncode:
            return "refused"
        text, whose = _dated(ended.stdout, file.read_text()), "llama.cpp"
    except TemplateError:
        return "refused"
    return f"{whose} {len(text)} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _dated(text: str, source: str) -> str:
    """What llama.cpp rendered, with the date of `NOW` in the place of today's."""
    for form in re.findall(r"strftime_now\(['\"](.+?)['\"]\)", source):
        text = text.replace(datetime.now().strftime(form), NOW.strftime(form))
    return text


def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def main(folder: Path, program: str) -> None:
    chat_template_utils.datetime = Clock
    files = sorted(folder.glob("*.jinja"))
    with tarfile.open(DATA / "llama_cpp_templates.tar.xz", "w:xz") as archive:
        for file in files:
            archive.add(file, file.name, filter=anonymous)
    renderings = {
        file.stem: [rendered(file, messages, program) for messages in CONVERSATIONS] for file in files
    }
    made = {"now": NOW.isoformat(), "conversations": CONVERSATIONS, "rendered": renderings}
    (DATA / "rendered_templates.json").write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
