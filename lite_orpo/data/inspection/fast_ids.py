"""A tokenizer that gives the same ids in two thirds of the time, for passes over whole files.

transformers' call computes offsets and masks that nobody reads here, and looks its special
tokens up anew each time. Every other way of using the tokenizer goes to the tokenizer itself.
"""

from typing import Any

from ..tokenization import Tokenizer

# The options of a call that asks for the ids of a text and nothing else.
_PLAIN_OPTIONS = {"add_special_tokens", "split_special_tokens", "verbose"}
_REMEMBERED = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "all_special_tokens", "all_special_ids"),
    "chat_template",
)


class FastIds:
    """Stands in for a tokenizer that does not change meanwhile.

    Args:
        tokenizer: a transformers tokenizer; one without a Rust backend is asked as it is.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        self._encode = getattr(self._backend, "encode_batch_fast", None)
        self._splits = bool(getattr(tokenizer, "split_special_tokens", False))
        self._is_settled = False
        for name in _REMEMBERED:
            if hasattr(tokenizer, name):
                setattr(self, name, getattr(tokenizer, name))

    def __call__(self, text: Any, **options: Any) -> Any:
        """The same as the tokenizer's; of a plain call, `input_ids` alone."""
        if (
            self._encode is None
            or type(text) is not str
            or options.get("add_special_tokens", True)
            or not _PLAIN_OPTIONS.issuperset(options)
        ):
            self._is_settled = False
            return self._tokenizer(text, **options)
        if not self._is_settled:
            # The backend remembers the truncation and padding of the call before.
            self._tokenizer("", add_special_tokens=False)
            self._is_settled = True
        splits = options.get("split_special_tokens")
        self._backend.encode_special_tokens = self._splits if splits is None else splits  # type: ignore[union-attr]
        return {"input_ids": self._encode([text], add_special_tokens=False)[0].ids}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)
