"""Turning what a library refuses about a setting into one line for the user.

transformers, peft and accelerate check settings of their own (a tracker that is not installed,
an attention backend that a model lacks). An exception that one of them raised is about the
configuration; one raised in our code or in torch is a bug, and keeps its traceback.
"""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError, UserError

_LIBRARIES = ("transformers", "peft", "accelerate", "huggingface_hub", "datasets", "bitsandbytes")


@contextlib.contextmanager
def library_refusals(config: Path, kinds: tuple[type[Exception], ...]) -> Iterator[None]:
    """Raise a ConfigError for what a library raises in the body.

    Args:
        config: the configuration file, for the message.
        kinds: the exceptions to look at.
    """
    try:
        yield
    except UserError:
        raise
    except kinds as error:
        raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
        if not set(Path(raised_in).parts) & set(_LIBRARIES):
            raise
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{config}: {text[0]}") from error
