"""What a user can have done wrong. Each message is one line: what, where, and what to do.

The command line prints such a message and exits with 2; any other exception is a bug of ours
and keeps its traceback. They are ValueErrors, so that Python callers can catch them as such.
"""


class UserError(ValueError):
    """A mistake that the user can mend; the message says how."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class ConfigError(UserError):
    """A configuration key or value that cannot be used."""


class DataError(UserError):
    """A preference file or data set that cannot be used."""


class ModelError(UserError):
    """A model, tokenizer or adapter setting that cannot be used."""


class HubError(UserError):
    """A name that is neither here nor reachable on the hub."""


class CheckpointError(UserError):
    """A checkpoint that cannot be written, or from which a run cannot go on."""


class NonFiniteError(UserError):
    """Steps in a row had a loss or a gradient that is not finite."""


class OutOfMemory(UserError):
    """Memory ran out, and there is nothing left to make smaller."""


class RowProblem(Exception):
    """Why one row cannot be trained on. Collected by the data room, never shown bare."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"column {column!r} {problem}")
        self.column = column
        self.problem = problem
