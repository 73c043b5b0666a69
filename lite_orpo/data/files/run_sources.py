"""The pairs that options name: those to train on and those held out."""

from pathlib import Path
from typing import NamedTuple

from ...config.options import DataOptions
from .sources import RowSource, SplitMissing, open_source


class Sources(NamedTuple):
    """Where a run's pairs come from."""

    train: RowSource
    held_out: RowSource | None


def open_run_sources(data: DataOptions) -> Sources:
    """Open what `dataset_name` and `eval_dataset_name` name, without reading it.

    Without `eval_dataset_name`, the held-out pairs are the test split of a folder or hub data
    set, where it has one.

    Raises:
        DataError: a file or data set cannot be opened.
        HubError: a name is neither here nor on the hub.
    """
    name = str(data.dataset_name)
    train = _open(data, name, data.dataset_train_split)
    if data.eval_dataset_name is not None:
        return Sources(train, _open(data, data.eval_dataset_name, data.dataset_test_split))
    if Path(name).expanduser().is_file():
        return Sources(train, None)
    try:
        return Sources(train, _open(data, name, data.dataset_test_split))
    except SplitMissing:
        # Not every folder or hub data set has the split; it was not asked for by name.
        return Sources(train, None)


def _open(data: DataOptions, name: str, split: str) -> RowSource:
    return open_source(
        name, split=split, config_name=data.dataset_config, column_mapping=data.column_mapping
    )
