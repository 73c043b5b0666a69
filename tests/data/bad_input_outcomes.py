"""What becomes of each file of bad_inputs/ at max_length 64: rows kept, or words of the error."""

from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent / "bad_inputs"


class Outcome(NamedTuple):
    """Either rows that are trained on, or the place, the column and more of the one-line error."""

    kept: int = 0
    place: str = ""
    words: str = ""


KEPT = {
    "ok.jsonl": Outcome(2),
    "byte_order_mark.jsonl": Outcome(2),
    "unicode.jsonl": Outcome(2),
    "duplicates.jsonl": Outcome(8),
    "mixed.jsonl": Outcome(2),
    "not_alternating.jsonl": Outcome(1),
    "message_prompt_text_completions.jsonl": Outcome(1),
    "text_prompt_message_completions.jsonl": Outcome(1),
}

REFUSED = {
    "missing_rejected.jsonl": Outcome(0, "line 1", "column 'rejected' is missing; columns found"),
    "missing_prompt.jsonl": Outcome(0, "line 1", "column 'prompt' is missing, and plain text"),
    "empty_chosen.jsonl": Outcome(0, "line 1", "column 'chosen' is empty"),
    "both_empty.jsonl": Outcome(0, "line 1", "column 'chosen' is empty"),
    "null_chosen.jsonl": Outcome(0, "line 2", "column 'chosen' is null"),
    "white_space.jsonl": Outcome(0, "line 1", "column 'chosen' is empty or white space only"),
    "number.jsonl": Outcome(0, "line 1", "column 'chosen' must be text or a list of messages"),
    "identical.jsonl": Outcome(0, "line 1", "column 'rejected' is identical to column 'chosen'"),
    "prompt_too_long.jsonl": Outcome(0, "line 1", "column 'prompt' is too long"),
    "one_prompt_too_long.jsonl": Outcome(0, "line 2", "column 'prompt' is too long"),
    "completion_too_long.jsonl": Outcome(0, "line 1", "column 'chosen' is too long"),
    "half_a_character.jsonl": Outcome(0, "line 1", "column 'chosen' holds half of a character"),
    "bad_line.jsonl": Outcome(0, "line 2", "not valid JSON"),
    "cut_off.jsonl.gz": Outcome(0, "after line ", "damaged or cut off"),
    "empty.jsonl": Outcome(0, "", "no rows; the file or data set is empty"),
    "latin1.jsonl": Outcome(0, "line 2", "byte 0xe9 is not UTF-8"),
    "empty_messages.jsonl": Outcome(0, "line 1", "column 'chosen' is an empty list of messages"),
    "unknown_role.jsonl": Outcome(0, "line 1", "column 'prompt' has a message with role 'usr'"),
    "capital_columns.jsonl": Outcome(0, "line 1", "column 'chosen' is missing; rename column 'Ch"),
    "two_prompts.jsonl": Outcome(0, "line 1", "column 'question' and column 'prompt' could both"),
    "key_twice.jsonl": Outcome(0, "line 1", "key 'chosen' stands there twice"),
    "deep.jsonl": Outcome(0, "line 2", "nested too deeply"),
    "open_quote.csv": Outcome(0, "line 3", "a quote is opened in this row and never closed"),
    "cut_off.parquet": Outcome(0, "", "cannot be read as parquet"),
    "wrapped.json": Outcome(0, "", "one JSON object; expected a list of rows"),
}

# Read as control tokens or as text: the tokenizer's side decides and tests it.
DECIDED_BY_THE_TOKENIZER = {"special_tokens_in_text.jsonl"}
