"""The error type for what a user can fix."""


class UserError(Exception):
    """Something the user can fix; the message says how.

    The command line prints only the message, without a stack trace.
    """
