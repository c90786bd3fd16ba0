"""The one error that a user's input may cause; the command line prints it as a single line, exit status 2."""

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A value that the user gave cannot be used. The message names the value and the mend, in one line."""


@contextmanager
def explained(failure: str, mend: str) -> Iterator[None]:
    """Make one `InputError` of whatever is raised inside: hubs, networks and file formats raise a dozen classes."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise InputError(f"{failure} ({reason}); {mend}") from error
