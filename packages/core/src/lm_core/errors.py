"""What a user can fix. Each kind carries the exit code its command ends with; anything else is our bug (exit code 1)."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

# what the system says when a disk takes no more: full, over quota, beyond a limit on file sizes, read-only
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS})


class UserError(Exception):
    """A mistake with a way out. The message names the field, the value and the fix, in that order."""

    code = 2


class ConfigError(UserError):
    """An option, a configuration file or a combination of both that cannot work."""


class InputError(UserError):
    """Data, a model or a tokenizer that is missing, malformed or out of range."""


class RunFailed(UserError):
    """The run itself went wrong: a loss that is not finite, a check that does not hold."""

    code = 3


class ResumeRefused(UserError):
    """A checkpoint that is incomplete, damaged, or does not belong to this configuration."""

    code = 4


class Interrupted(UserError):
    """Stopped by a signal after everything was saved."""

    code = 130


@contextmanager
def reading(what: str, way_out: str) -> Iterator[None]:
    """Whatever goes wrong while a user's file is opened and taken apart, as one InputError: every library has kinds of its own for that.

    >>> with reading("data: x.json", "write it again"):
    ...     int("{")
    Traceback (most recent call last):
    lm_core.errors.InputError: data: x.json cannot be read (invalid literal for int() with base 10: '{'); write it again
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise InputError(f"{what} cannot be read ({str(error) or type(error).__name__}); {way_out}") from None
