"""The common shape of a preference row; every format is brought into it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")


class PreferenceRow(NamedTuple):
    """A prompt and two completions, all strings or all message lists."""

    prompt: str | list[Message]
    chosen: str | list[Message]
    rejected: str | list[Message]
    tools: list[Any] | None = None
    """What the `tools` column holds, for the chat template; only with messages."""

    @property
    def is_conversational(self) -> bool:
        """Whether the texts are message lists."""
        return not isinstance(self.prompt, str)
