"""The data sets a trainer is given, prepared once each, with their reports."""

from collections.abc import Mapping
from typing import Any

from .preparation import LengthRule, PreparationReport, prepare_pairs
from .sources import RowSource, dataset_source, refuse_columns
from .tokenization import Tokenizer


def is_mapping_of_sets(dataset: Any) -> bool:
    """Whether this is several named data sets (a DatasetDict is one, too)."""
    return isinstance(dataset, Mapping)


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
