"""What a user can fix. Each kind carries the exit code its command ends with; anything else is our bug (exit code 1)."""

from __future__ import annotations

import errno

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
