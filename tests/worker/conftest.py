"""Each test of the worker must leave no process and no open descriptor."""

from __future__ import annotations

from left_behind import nothing_left

__all__ = ["nothing_left"]
