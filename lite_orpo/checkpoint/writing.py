"""What cannot be written (a full disk, a folder that is read-only) becomes one line."""

import contextlib
from collections.abc import Iterator

from safetensors import SafetensorError

from ..errors import CheckpointError, UserError


@contextlib.contextmanager
def writing(what: str, advice: str) -> Iterator[None]:
    """Say in one line that something could not be written.

    Args:
        what: what is being written.
        advice: what stands, and what to do.

    Raises:
        CheckpointError: a file could not be written in the body.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not _is_write_error(error):
            raise
        raise CheckpointError(
            f"{what} could not be written ({write_reason(error)}); {advice}"
        ) from error


def write_reason(error: BaseException) -> str:
    """Why a file could not be written or read, in a few words."""
    strerror = getattr(error, "strerror", None)
    return str(strerror or error or type(error).__name__).splitlines()[0]


def _is_write_error(error: BaseException) -> bool:
    # The tokenizer's own library raises no OSError.
    return isinstance(error, (OSError, SafetensorError)) or "os error" in str(error)
