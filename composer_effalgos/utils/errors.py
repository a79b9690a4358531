"""The exception type for input that a user can mend, and the one of checkpoints."""

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


class CheckpointError(InputError):
    """A checkpoint that a run cannot continue with.

    Args:
        reason: What is wrong and what would be right. The message begins with ``load_path``; a recipe may have another key for it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f'load_path: {reason}')
        self.reason = reason
