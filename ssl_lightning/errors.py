"""The one error type for what a user can mend."""


class UserError(Exception):
    """Something the user can mend; the message says how.

    The command line prints the message alone, without a stack trace.
    """
