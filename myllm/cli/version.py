"""What `myllm --version` says: MyLLM's version and those of the two libraries below it.

Must not import llama_cpp, which would take a sixth of a second: llama.cpp's own version is asked of
its shared library alone. What cannot be known is called unknown.
"""

from __future__ import annotations

from pathlib import Path

from myllm import __version__

UNKNOWN = "unknown"


def versions() -> str:
    """`myllm 1.2.3 (llama-cpp-python 0.3.36, llama.cpp 0.5.0, ggml 0.25.3 …)`, on one line."""
    return (
        f"myllm {__version__} (llama-cpp-python {_binding_version()}, "
        f"llama.cpp {_from_library('llama', 'llama_version')}, "
        f"ggml {_from_library('ggml-base', 'ggml_version')} {_from_library('ggml-base', 'ggml_commit')})"
    )


def _binding_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("llama-cpp-python")
    except PackageNotFoundError:
        return "not installed"


def _from_library(library: str, function: str) -> str:
    """What a function of a library of llama.cpp's, which takes nothing and returns text, says."""
    import ctypes

    for path in _library_files(library):
        try:
            ask = getattr(ctypes.CDLL(str(path)), function)
        except (OSError, AttributeError):  # cannot be loaded, or is too old to tell
            continue
        ask.restype = ctypes.c_char_p
        if answer := ask():
            return str(answer.decode(errors="replace"))
    return UNKNOWN


def _library_files(library: str) -> list[Path]:
    """The shared library in llama_cpp's package folder, on Linux or macOS."""
    from importlib.util import find_spec

    spec = find_spec("llama_cpp")
    folders = spec.submodule_search_locations if spec else None
    names = (f"lib{library}.so", f"lib{library}.dylib")
    return [
        file for folder in folders or () for name in names if (file := Path(folder, "lib", name)).is_file()
    ]
