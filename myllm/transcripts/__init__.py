"""Conversations as files: MyLLM's own, other programs', and pages to read.

Pure but for `importing.py`, which opens what is read, and `llm_logs.py`, which asks a database: bytes and
lines ⇄ a session and its messages. One format a file. Must not know where MyLLM keeps sessions, commands or
terminals; contents are kept as they are, and who shows them escapes them.

`importing.read` takes in any format; `native.export`, `openai.export`, `markdown.render` and `plain.render`
write.
"""

from typing import Final

FORMATS: Final = ("myllm", "openai", "claude-code", "codex", "chatgpt", "llm")
"""What can be imported."""
