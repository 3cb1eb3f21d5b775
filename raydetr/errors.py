"""The one error that speaks to the user: what is wrong, where, and what to do, in one line."""


class UserError(Exception):
    """Bad input or an impossible request. The command line prints it as one line and exits with code 2."""
