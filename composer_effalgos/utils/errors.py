"""Exceptions for input that the user can correct."""

from composer_effalgos.utils.text import one_line


class InputError(ValueError):
    """Invalid input: a recipe, path, checkpoint or argument.

    The message is one line that names the key or file, what is wrong and what would be right. The command line prints it without a
    traceback and exits with status 2; in a script it is an ordinary ``ValueError``.
    """

    @property
    def line(self) -> str:
        """The message alone, without the traceback that a DataLoader worker puts before it."""
        return one_line(str(self).strip().rpartition('InputError: ')[2])


class TooFewSamplesError(InputError):
    """A batch size that is larger than the dataset."""


class CheckpointError(InputError):
    """A checkpoint from which a run cannot continue.

    Args:
        reason: What is wrong and what would be right. The message begins with ``load_path``; a recipe may use another key for it.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(f'load_path: {reason}')
        self.reason = reason
