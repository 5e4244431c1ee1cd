"""The error tree: every failure a user can meet, with its stable code, exit status and HTTP status.

A leaf: imports nothing of MyLLM. Library exceptions are mapped to these once, in the module
that calls the library. The message reads `what: why; what to do next`, on one line.
"""

from __future__ import annotations

from typing import ClassVar


class MyllmError(Exception):
    """Any failure MyLLM reports: `code` for programs, `exit_status` for shells, `http_status` for HTTP."""

    code: ClassVar[str] = "internal"
    exit_status: ClassVar[int] = 70
    http_status: ClassVar[int] = 500

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))

    def to_wire(self) -> dict[str, str]:
        """The object behind `"error"` in a done event."""
        return {"code": self.code, "message": str(self)}


class UsageError(MyllmError):
    code, exit_status, http_status = "usage", 2, 400


class BadDataError(MyllmError):
    """A file, hash, line or value that is not what it should be."""

    code, exit_status, http_status = "bad_data", 65, 400


class NotFoundError(MyllmError):
    """No such model, session or file."""

    code, exit_status, http_status = "not_found", 66, 404


class ContextOverflowError(MyllmError):
    """The prompt does not fit the context window; nothing was generated."""

    code, exit_status, http_status = "context_overflow", 67, 400


class UnavailableError(MyllmError):
    """The daemon, or a model's worker, cannot be had."""

    code, exit_status, http_status = "unavailable", 69, 503


class WorkerCrashedError(UnavailableError):
    """The process that ran the model died; the message carries its last words."""

    code = "worker_crashed"


class InternalError(MyllmError):
    """A bug in MyLLM."""


class CannotCreateError(MyllmError):
    code, exit_status, http_status = "cannot_create", 73, 500


class IOFailureError(MyllmError):
    code, exit_status, http_status = "io", 74, 500


class TryAgainError(MyllmError):
    """A queue is full or something is locked; the same call may succeed later."""

    code, exit_status, http_status = "try_again", 75, 429


class PermissionDeniedError(MyllmError):
    code, exit_status, http_status = "permission", 77, 403


class ConfigError(MyllmError):
    """An unknown key or a bad value in the configuration."""

    code, exit_status, http_status = "config", 78, 500


class DeadlineError(MyllmError):
    """The deadline passed before there was anything to give."""

    code, exit_status, http_status = "deadline", 124, 504


BY_CODE: dict[str, type[MyllmError]] = {
    cls.code: cls
    for cls in (
        UsageError,
        BadDataError,
        NotFoundError,
        ContextOverflowError,
        UnavailableError,
        WorkerCrashedError,
        InternalError,
        CannotCreateError,
        IOFailureError,
        TryAgainError,
        PermissionDeniedError,
        ConfigError,
        DeadlineError,
    )
}


def from_wire(error: dict[str, str]) -> MyllmError:
    """The exception behind a done event's `"error"`; an unknown code is an internal error."""
    cls = BY_CODE.get(error.get("code", ""), InternalError)
    return cls(error.get("message", "an error without a message"))
