"""An answer word by word, as it is made."""

from collections.abc import Callable
from typing import Any

from transformers import TextStreamer


class WordStreamer(TextStreamer):
    """Hands an answer on in pieces of whole words; for one prompt at a time.

    Args:
        tokenizer: of the model.
        tell: is called with each piece.
    """

    def __init__(self, tokenizer: Any, tell: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._tell = tell
        self._parts: list[str] = []

    @property
    def text(self) -> str:
        """All that was handed on so far."""
        return "".join(self._parts)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand a piece on."""
        # White space before the first word is the template's.
        text = text if self._parts else text.lstrip()
        if text:
            self._parts.append(text)
            self._tell(text)
