"""Small sets of pairs, clean or with one thing wrong, for the tests of `lite-orpo check`."""

import random
from typing import Any

from lite_orpo.data.files.sources import RowSource, dataset_source

Row = dict[str, Any]
WORDS = "amber birch cedar delta ember flint grove heath inlet juniper kelp larch".split()


def clean_rows(count: int = 200, seed: int = 0) -> list[Row]:
    """Pairs without a finding: other prompts, random answers, no side longer or begun alike."""
    dice = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(dice.choice(WORDS) for _ in range(dice.randint(least, most)))

    return [
        {"prompt": f"Question {seed} {i}?", "chosen": words(4, 12), "rejected": words(4, 12)}
        for i in range(count)
    ]


def swapped(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


def source_of(rows: list[Any], name: str = "rows") -> RowSource:
    return dataset_source(name, rows)
