"""Files of prompts in the formats of two benchmarks, and the files of answers they want back.

AlpacaEval (github.com/tatsu-lab/alpaca_eval): rows with `instruction`; answers are one JSON list.
MT-Bench (FastChat, `fastchat/llm_judge`): rows with `question_id`, `category` and `turns`; answers
are JSON lines. Sampling temperatures by category are FastChat's (`temperature_config`; 0.7 for a
category that it does not name).
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.row_source import RowSource
from ..errors import DataError

ALPACA_EVAL, MT_BENCH = "alpaca_eval", "mt_bench"
FORMATS = (ALPACA_EVAL, MT_BENCH)

_TEMPERATURES = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
    "arena-hard-200": 0.0,
}
_OTHER_TEMPERATURE = 0.7


class Item(NamedTuple):
    """One entry of a prompt file."""

    key: str | int
    """MT-Bench's question_id; of AlpacaEval the number of the row."""
    turns: tuple[str, ...]
    """What the user says; each after the first sees the answers before it."""
    temperature: float
    """As the benchmark has it."""
    about: str
    """AlpacaEval's `dataset`, MT-Bench's `category`."""


def read_items(source: RowSource, form: str) -> list[Item]:
    """Read a prompt file.

    Args:
        source: its rows.
        form: one of `FORMATS`.

    Raises:
        DataError: a row lacks a key or has it in another shape, or there are no rows.
    """
    read = _alpaca_item if form == ALPACA_EVAL else _mt_bench_item
    items: list[Item] = []
    seen: dict[str | int, str] = {}
    for number, (place, raw) in enumerate(source.read()):
        where = f"{source.name} {place}"
        if not isinstance(raw, dict):
            raise DataError(f"{where}: expected an object with keys, found {type(raw).__name__}")
        item = read(raw, number, where, source)
        if item.key in seen:
            raise DataError(f"{where}: question_id {item.key!r} is that of {seen[item.key]} too")
        seen[item.key] = place
        items.append(item)
    if not items:
        raise DataError(f"{source.name}: there are no prompts in it")
    return items


def write_answers(
    path: Path, form: str, items: Sequence[Item], answers: Sequence[Sequence[str]], name: str,
    stamps: Sequence[float],
) -> None:  # fmt: skip
    """Write the answers in the benchmark's own format.

    Args:
        path: the file.
        form: one of `FORMATS`.
        items: the prompts.
        answers: of each item, one a turn.
        name: of the model; AlpacaEval's `generator`, MT-Bench's `model_id`.
        stamps: when each was answered, seconds since 1970.

    Raises:
        OSError: it cannot be written.
    """
    if form == ALPACA_EVAL:
        rows = [
            {
                "dataset": item.about,
                "instruction": item.turns[0],
                "output": texts[0],
                "generator": name,
            }
            for item, texts in zip(items, answers, strict=True)
        ]
        path.write_text(json.dumps(rows, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return
    with path.open("w", encoding="utf-8") as stream:
        for item, texts, stamp in zip(items, answers, stamps, strict=True):
            digest = hashlib.blake2b(repr((name, item.key, stamp, texts)).encode(), digest_size=11)
            row = {
                "question_id": item.key,
                "answer_id": digest.hexdigest(),
                "model_id": name,
                "choices": [{"index": 0, "turns": list(texts)}],
                "tstamp": stamp,
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def _alpaca_item(raw: dict[str, Any], number: int, where: str, source: RowSource) -> Item:
    text = _text(raw, "instruction", where, ALPACA_EVAL)
    about = raw.get("dataset")
    return Item(number, (text,), 0.0, str(about) if about else Path(source.name).stem)


def _mt_bench_item(raw: dict[str, Any], number: int, where: str, source: RowSource) -> Item:
    key = raw.get("question_id")
    if isinstance(key, bool) or not isinstance(key, (int, str)):
        raise DataError(f"{where}: question_id must be a number or a text; {_found(raw, MT_BENCH)}")
    category = _text(raw, "category", where, MT_BENCH)
    turns = raw.get("turns")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: turns must be a list of texts; {_found(raw, MT_BENCH)}")
    for turn in turns:
        if not isinstance(turn, str) or not turn.strip():
            raise DataError(f"{where}: turns has an entry that is no text, or empty")
    return Item(key, tuple(turns), _TEMPERATURES.get(category, _OTHER_TEMPERATURE), category)


def _text(raw: dict[str, Any], key: str, where: str, form: str) -> str:
    value = raw.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} must be a text that is not empty; {_found(raw, form)}")
    return value


def _found(raw: dict[str, Any], form: str) -> str:
    keys = ", ".join(repr(str(key)) for key in list(raw)[:8])
    return f"keys found: {keys} (is this a file for --format {form}?)"
