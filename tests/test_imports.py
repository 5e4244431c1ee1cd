"""What is imported, and when: a light command line, and packages that know only what is below them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import myllm

PACKAGE = Path(myllm.__file__).parent
HEAVY = {"llama_cpp", "numpy", "fastapi", "sqlite_utils", "asyncio"}
"""What no command pays for that does not need it: each takes 20 ms or more."""
DEAR = HEAVY | {
    *("tqdm", "jinja2", "tomllib", "subprocess", "huggingface_hub", "importlib.metadata", "hashlib"),
    "prompt_toolkit",
    "sqlite3",
}

LEAVES = {
    *(
        "conversation",
        "errors",
        "events",
        "hardware",
        "locks",
        "logs",
        "paths",
        "protocol",
        "requests",
        "settings",
        "snapshot_files",
    ),
    *("socket_file", "spawning", "tokenizer"),
}
MIDDLE = {"engine", "models", "prompts", "storage", "transcripts"}
BELOW: dict[str, set[str]] = {
    **{package: set() for package in MIDDLE},
    "worker": {"engine", "models", "prompts"},
    "runtime": MIDDLE,
    "client": {"runtime"},
    "daemon": {"runtime"},
    "http": {"runtime"},
    "cli": {"client", "daemon", "models", "storage", "transcripts"},
}
"""A room a process: package → the packages it may import; each also itself and the leaves."""


def imported_by(*arguments: str) -> set[str]:
    """Every module that `myllm ARGUMENTS` has imported when it ends."""
    code = (
        "import os, sys; end = os._exit; tell = lambda: print(*sys.modules, file=sys.stderr, flush=True); "
        "os._exit = lambda status: (tell(), end(status)); "
        f"sys.argv = {['myllm', *arguments]!r}; from myllm.__main__ import main; main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=True
    )
    return set(ended.stderr.split())


@pytest.mark.parametrize(
    "arguments", [["--help"], ["gen", "--help"], ["embed", "--help"], ["sessions", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    modules = imported_by(*arguments)
    assert "myllm.cli" in modules
    assert not modules & DEAR


def test_help_imports_no_command() -> None:
    assert not {
        name for name in imported_by("--help") if name.startswith(("myllm.cli.gen", "myllm.cli.models"))
    }


def test_what_gen_needs_with_a_daemon_is_light() -> None:
    code = "import sys, myllm.cli.gen, myllm.client.client, myllm.settings; print(*sys.modules, sep='\\n')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(ended.stdout.split()) & DEAR


# ── imports point down ──────────────────────────────────────────────────────────────────────


def modules() -> Iterator[tuple[str, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield ".".join(file.relative_to(PACKAGE).with_suffix("").parts), ast.parse(file.read_text())


def imports(tree: ast.Module) -> Iterator[str]:
    """Full names of what a module imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not our way"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def parts_imported(tree: ast.Module) -> set[str]:
    """Leaves and packages of MyLLM that a module imports."""
    names = (name.split(".") for name in imports(tree))
    known = LEAVES | set(BELOW) | {"__main__"}
    return {name[1] for name in names if name[0] == "myllm" and len(name) > 1 and name[1] in known}


MODULES = dict(modules())


@pytest.mark.parametrize("name", [name for name in MODULES if name.split(".")[0] in BELOW])
def test_imports_point_down(name: str) -> None:
    package = name.split(".")[0]
    assert parts_imported(MODULES[name]) <= {package} | BELOW[package] | LEAVES


@pytest.mark.parametrize("name", sorted(LEAVES & set(MODULES)))
def test_leaves_import_only_leaves(name: str) -> None:
    assert parts_imported(MODULES[name]) <= LEAVES


def test_every_part_of_the_package_has_its_place() -> None:
    assert {name.split(".")[0] for name in MODULES} <= LEAVES | set(BELOW) | {"__init__", "__main__"}


def test_the_program_knows_no_subcommand() -> None:
    names = [name for name in imports(MODULES["__main__"]) if name.startswith("myllm.cli")]
    assert set(names) <= {"myllm.cli", "myllm.cli.myllm", "myllm.cli.console"} | {
        f"myllm.cli.console.{name}" for name in ("Streams", "write_failure")
    }


def test_only_one_module_imports_llama_cpp() -> None:
    importers = {
        name for name, tree in MODULES.items() if any(n.split(".")[0] == "llama_cpp" for n in imports(tree))
    }
    assert importers <= {"engine.llama"}
