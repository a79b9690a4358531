"""The one exception type for input that a user can mend."""


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
        The message, every run of white space as one space.
    """
    return ' '.join(str(error).split()) or type(error).__name__
