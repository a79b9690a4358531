"""The one exception type for input that a user can mend."""


class InputError(ValueError):
    """Bad input: a recipe, path, checkpoint or argument.

    The message is one line that names the key or file, what was wrong and what would be right. The command line prints it without a
    traceback and exits with status 2; in a script it is an ordinary ``ValueError``.
    """
