"""Control tokens that stand as text in the rows: `<|im_end|>` inside an answer, say."""

import re
from collections import Counter
from collections.abc import Iterable

from .finding import Finding, Places, Severity
from .seen_row import SeenRow

# Where no tokenizer says which there are: those of the families that most people meet.
USUAL_TOKENS = (
    *("<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "<|endoftext|>", "<|end_of_text|>"),
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>"),
    *("<|system|>", "<|end|>", "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"),
)


class SpecialTokensInText:
    """Counts rows that hold a special token as text.

    Args:
        tokens: the tokenizer's; None: those of the usual model families.
    """

    def __init__(self, tokens: Iterable[str] | None = None) -> None:
        self._are_usual_ones = tokens is None
        known = sorted({t for t in (USUAL_TOKENS if tokens is None else tokens) if t.strip()})
        self._pattern = re.compile("|".join(re.escape(t) for t in known[::-1])) if known else None
        self._rows = Places()
        self._tokens: Counter[str] = Counter()

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        if self._pattern is None:
            return
        found: set[str] = set()
        for text in (row.prompt, row.chosen, row.rejected):
            found.update(self._pattern.findall(text))
        if found:
            self._rows.add(row.place)
            self._tokens.update(found)

    def findings(self) -> list[Finding]:
        """The rows with special tokens."""
        if not self._rows.count:
            return []
        ordered = sorted(self._tokens.items(), key=lambda item: (-item[1], item[0]))
        tokens = ", ".join(f"{token} in {rows}" for token, rows in ordered[:5])
        whose = "of well-known models" if self._are_usual_ones else "of this tokenizer"
        return [
            Finding(
                "special_tokens_in_text",
                Severity.WARNING,
                f"Special tokens {whose} stand as text in the rows ({tokens})",
                self._rows.count,
                self._rows.examples,
                "In messages and answers they are spelled out as text, so a template left over "
                "from another model teaches the model to write its marks; plain text that begins "
                "with one is taken as written by a template, marks and all.",
                "Take them out of the texts, unless they are what the text is about. "
                "`lite-orpo check DATA --model MODEL --show N` shows what they become.",
            )
        ]
