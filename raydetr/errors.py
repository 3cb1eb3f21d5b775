"""The one error that speaks to the user: what is wrong, where, and what to do, in one line."""

import errno


class UserError(Exception):
    """Bad input or an impossible request. The command line prints it as one line and exits with code 2."""


class DiskFull(UserError):
    """The disk of a run is full. The run is not to blame: it can be gone on with once there is room."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether ``error``, or what it came from, is a full disk's."""
    while error is not None and not isinstance(error, DiskFull):
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        error = error.__cause__ or error.__context__
    return error is not None
