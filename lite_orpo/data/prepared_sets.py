"""The data sets a trainer is given, prepared once each, with their reports."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import DataError
from .files.sources import RowSource, dataset_source, refuse_columns
from .preparation import LengthRule, PreparationReport, prepare_pairs
from .tokens.tokenization import Tokenizer

logger = logging.getLogger(__name__)


def is_mapping_of_sets(dataset: Any) -> bool:
    """Whether this is several named data sets (a DatasetDict is one, too)."""
    return isinstance(dataset, Mapping)


class GivenSets(NamedTuple):
    """What is trained on, and what is held out; each as it was given, or a split of it."""

    train: Any
    held_out: Any


_HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "eval", "dev")


def choose_splits(train_dataset: Any, eval_dataset: Any, *, evaluates: bool) -> GivenSets:
    """Of a DatasetDict given to train on, the split that is meant.

    Args:
        train_dataset: anything; of a DatasetDict its split "train", or the only one that it has.
        eval_dataset: anything; None: the dictionary's one held-out split, where `evaluates`.
        evaluates: whether the run asks for evaluations.

    Raises:
        DataError: several splits could be meant; the message names them.
    """
    if not (is_mapping_of_sets(train_dataset) and hasattr(train_dataset, "column_names")):
        return GivenSets(train_dataset, eval_dataset)
    splits = [str(split) for split in train_dataset]
    alike = [split for split in splits if split.startswith("train")]
    if "train" in splits:
        chosen = "train"
    elif len(alike) == 1 or len(splits) == 1:
        chosen = (alike or splits)[0]
    else:
        raise DataError(
            f"train_dataset has the splits {', '.join(splits)}; pass one of them, such as "
            f"dataset[{(alike or splits or ['train'])[0]!r}]"
        )
    shown = f"trains on {chosen!r}"
    held_out = [split for split in splits if split in _HELD_OUT_SPLITS and split != chosen]
    if eval_dataset is None and evaluates and held_out:
        if len(held_out) > 1:
            raise DataError(
                f"train_dataset has several held-out splits ({', '.join(held_out)}); pass one, "
                f"eval_dataset=dataset[{held_out[0]!r}]"
            )
        name = held_out[0]
        eval_dataset = dataset_source(f"train_dataset[{name!r}]", train_dataset[name])
        shown += f", evaluates on {name!r}"
    logger.info("train_dataset has the splits %s: this run %s", ", ".join(splits), shown)
    return GivenSets(
        dataset_source(f"train_dataset[{chosen!r}]", train_dataset[chosen]), eval_dataset
    )


class PreparedSets:
    """Prepares raw rows by one rule, and remembers what became of them."""

    def __init__(self, tokenizer: Tokenizer, rule: LengthRule, on_bad_row: str) -> None:
        self._tokenizer = tokenizer
        self._rule = rule
        self._on_bad_row = on_bad_row
        self.reports: list[PreparationReport] = []

    def prepare(self, name: str, dataset: Any) -> Any:
        """Token ids of a data set's pairs.

        Args:
            name: the argument it was given as, for messages.
            dataset: raw rows (also without a length: they are read once, into a file), a
                `RowSource`, None, or what this method has returned before.

        Raises:
            DataError: the rows cannot be used.
        """
        if dataset is None or "prompt_input_ids" in (getattr(dataset, "column_names", None) or ()):
            return dataset
        source = dataset if isinstance(dataset, RowSource) else dataset_source(name, dataset)
        prepared = prepare_pairs(source, self._tokenizer, self._rule, self._on_bad_row)
        self.reports.append(prepared.report)
        return prepared.dataset

    def prepare_each(self, name: str, dataset: Any) -> Any:
        """The same, of each set of a mapping; or of a single one.

        Raises:
            DataError: as `prepare`, or the mapping is one of columns.
        """
        if is_mapping_of_sets(dataset):
            refuse_columns(name, dataset)
            return {key: self.prepare(f"{name}[{key!r}]", rows) for key, rows in dataset.items()}
        return self.prepare(name, dataset)
