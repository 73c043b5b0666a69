"""Control tokens that stand as text in the rows: `<|im_end|>` inside an answer, say."""

import re
from collections import Counter

from ..tokens.tokenization import KEPT_AS_TEXT, READ_AS_CONTROL, READ_AS_WRITTEN_BY_A_TEMPLATE
from .finding import Finding, Places, Severity
from .seen_row import SeenRow

# Where no tokenizer says which there are: those of the families that most people meet.
USUAL_TOKENS = (
    *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|end|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
)
_USUAL = re.compile("|".join(map(re.escape, sorted(USUAL_TOKENS, reverse=True))))


_HARM = {
    KEPT_AS_TEXT: (
        "They are spelled out as text, so a template left over from another model teaches the "
        "model to write its marks."
    ),
    READ_AS_WRITTEN_BY_A_TEMPLATE: (
        "Plain text that begins with one is taken as written by a chat template: the marks in it "
        "become control tokens."
    ),
    READ_AS_CONTROL: (
        "This tokenizer or its chat template cannot keep them as text, so somebody's words become "
        "control tokens."
    ),
}
_HARM_WITHOUT_TOKENIZER = (
    "In messages and answers they are spelled out as text, so a template left over from another "
    "model teaches the model to write its marks; plain text that begins with one is taken as "
    "written by a template, marks and all."
)


class SpecialTokensInText:
    """Counts rows that hold a special token as text.

    With a tokenizer, what counts is what the tokenisation reports: a BOS that begins a prompt and
    an EOS that ends an answer mean what they say. Without one, the tokens of the usual model
    families are looked for.

    Args:
        has_tokenizer: whether the rows are tokenised.
    """

    def __init__(self, has_tokenizer: bool = False) -> None:
        self._has_tokenizer = has_tokenizer
        self._rows = Places()
        self._tokens: Counter[str] = Counter()
        self._readings: Counter[str] = Counter()

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        found: set[str] = set()
        if not self._has_tokenizer:
            for text in (row.prompt, row.chosen, row.rejected):
                found.update(_USUAL.findall(text))
        elif row.special_text is not None:
            found.add(row.special_text.token)
            self._readings[row.special_text.reading] += 1
        if found:
            self._rows.add(row.place)
            self._tokens.update(found)

    def findings(self) -> list[Finding]:
        """The rows with special tokens."""
        if not self._rows.count:
            return []
        ordered = sorted(self._tokens.items(), key=lambda item: (-item[1], item[0]))
        tokens = ", ".join(f"{token} in {rows}" for token, rows in ordered[:5])
        if self._has_tokenizer:
            # Each row tells the first that stands in it.
            readings = [reading for reading in _HARM if self._readings[reading]]
            counts = ", ".join(f"{self._readings[reading]} {reading}" for reading in readings)
            title = f"Special tokens of this tokenizer stand as text in the rows ({tokens}): "
            title, harm = title + counts, " ".join(_HARM[reading] for reading in readings)
        else:
            title = f"Special tokens of well-known models stand as text in the rows ({tokens})"
            harm = _HARM_WITHOUT_TOKENIZER
        return [
            Finding(
                "special_tokens_in_text",
                Severity.WARNING,
                title,
                self._rows.count,
                self._rows.examples,
                harm,
                "Take them out of the texts, unless they are what the text is about. "
                "`lite-orpo check DATA --model MODEL --show N` shows what they become.",
            )
        ]
