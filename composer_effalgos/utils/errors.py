"""The one exception type for input that a user can mend."""

from composer_effalgos.utils.text import one_line


class InputError(ValueError):
    """Bad input: a recipe, path, checkpoint or argument.

    The message is one line that names the key or file, what was wrong and what would be right. The command line prints it without a
    traceback and exits with status 2; in a script it is an ordinary ``ValueError``.
    """

    @property
    def line(self) -> str:
        """The message; from a DataLoader worker it comes as a traceback that ends in it."""
        return one_line(str(self).strip().rpartition('InputError: ')[2])
