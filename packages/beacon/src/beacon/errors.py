"""Mistakes that only this package knows."""

from __future__ import annotations

from lm_core.errors import UserError


class CacheError(UserError):
    """A memory of another model, or an operation that would cut into memory."""


class CapacityError(UserError):
    """A text that needs more positions or more memory than there are; exit code 3 once a stream has begun."""

    def __init__(self, message: str, begun: bool) -> None:
        super().__init__(message)
        self.code = 3 if begun else 2


class BackendError(UserError):
    """A way of computing that this machine cannot offer."""
