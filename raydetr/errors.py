"""The error for the user, which says in one line what is wrong, where, and what to do."""

import errno


class UserError(Exception):
    """Bad input or an impossible request. The command line prints the message and exits with code 2."""


class DiskFull(UserError):
    """The disk of a run is full. The run can be resumed once there is room."""


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is about a full disk."""
    while error is not None and not isinstance(error, DiskFull):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return error is not None
