"""`myllm chat` at a terminal. `converse` is the way in; it is imported when stdin is a terminal."""

from myllm.cli.repl.loop import converse

__all__ = ["converse"]
