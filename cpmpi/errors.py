"""The error that is the user's to mend."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can put right, in one line that names the place, the numbers and the choices.

    The command line prints it as ``error: ...`` with no traceback; every other exception is a fault of ours.
    """
