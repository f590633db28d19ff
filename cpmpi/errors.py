"""Errors that the user can act on."""


class UserError(ValueError):
    """A problem that the user can act on: one line that names the file, the numbers and the choices."""
