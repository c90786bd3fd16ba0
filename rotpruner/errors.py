"""The one error that a user's input may cause; the command line prints it as a single line, exit status 2."""


class InputError(ValueError):
    """A value that the user gave cannot be used. The message names the value and the mend, in one line."""
