"""The one exception type for input that a user can mend."""

from typing import Any

_LONGEST = 700  # characters of a message


class InputError(ValueError):
    """Bad input: a recipe, path, checkpoint or argument.

    The message is one line that names the key or file, what was wrong and what would be right. The command line prints it without a
    traceback and exits with status 2; in a script it is an ordinary ``ValueError``.
    """

    @property
    def line(self) -> str:
        """The message; from a DataLoader worker it comes as a traceback that ends in it."""
        return one_line(str(self).strip().rpartition('InputError: ')[2])


def one_line(error: object) -> str:
    """The message of an exception on one line, or the name of its type where it has none.

    Args:
        error: The exception, or its message.

    Returns:
        The message, every run of white space as one space, cut off where it is very long.
    """
    text = ' '.join(str(error).split()) or type(error).__name__
    return text if len(text) <= _LONGEST else f'{text[:_LONGEST]} ...'


def shown(value: Any) -> str:
    """A value from a file as it stands in a message: on one line, and not too long."""
    text = repr(value)
    return text if len(text) <= 80 else f'{text[:77]}...'
