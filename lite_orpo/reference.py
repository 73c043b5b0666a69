"""The reference of DPO and IPO: the same model before training, its log-probabilities kept.

With an adapter the reference is the model with the adapter switched off; without one, the weights
that the training begins with. Each pair passes it once; what comes out goes into the data set as
two columns and into a file, which a resumed run, or another run with the same model and pairs,
reads. No second model is loaded.
"""

import contextlib
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .data.row_batch import REFERENCE_COLUMNS
from .errors import ConfigError
from .fingerprint import data_digest, weights_digest
from .model.adapter import adapter_switched_off
from .out_of_memory import RowRoom
from .pair_scores import score_pairs

logger = logging.getLogger(__name__)


class Reference:
    """Gives data sets the reference's log-probabilities.

    Args:
        trainer: an `ORPOTrainer` before its first step.
        room: tokens that a row may have.
    """

    def __init__(self, trainer: Any, room: RowRoom) -> None:
        self._trainer = trainer
        self._room = room
        self._has_adapter = hasattr(trainer.model, "disable_adapter")
        self._is_gone = False
        if trainer.equal_rows and trainer.objective.kind.uses_reference:
            raise ConfigError(
                f"loss_type {trainer.args.loss_type} is not supported with FSDP: its reference "
                "passes the pairs rank by rank; use orpo, simpo or cpo, or plain data parallelism"
            )

    def begin_training(self) -> None:
        """From here on, weights that train in full are no longer the reference's."""
        self._is_gone = not self._has_adapter

    def on(self, dataset: Any) -> Any:
        """The data set with the reference's columns; as it is, where the loss needs none.

        Args:
            dataset: from `prepare_pairs`, or a mapping of names to such, or None.

        Raises:
            ConfigError: the reference is gone, for it is what has been trained.
        """
        if dataset is None or not self._trainer.objective.kind.uses_reference:
            return dataset
        if isinstance(dataset, dict):
            return {name: self.on(part) for name, part in dataset.items()}
        if len(dataset) == 0 or REFERENCE_COLUMNS[0] in dataset[0]:
            return dataset
        if self._is_gone:
            raise ConfigError(
                f"loss_type {self._trainer.args.loss_type} compares with the model before its "
                "training, which is gone; give these pairs to the trainer as eval_dataset"
            )
        chosen, rejected = self._logps(dataset)
        columns = dict(zip(REFERENCE_COLUMNS, (chosen.tolist(), rejected.tolist()), strict=True))
        if hasattr(dataset, "add_column"):
            for name, values in columns.items():
                dataset = dataset.add_column(name, values)
            return dataset
        return [
            {**row, **{name: values[i] for name, values in columns.items()}}
            for i, row in enumerate(dataset)
        ]

    def _logps(self, dataset: Any) -> tuple[Tensor, Tensor]:
        path = self._path(dataset)
        kept = _read(path, len(dataset)) if self._all_ranks_see(path) else None
        if kept is not None:
            logger.info("the reference's log-probabilities are read from %s", path.name)
            return kept
        switch_off = adapter_switched_off if self._has_adapter else contextlib.nullcontext
        with switch_off(self._trainer.model):
            scores = score_pairs(self._trainer, self._room, dataset, "Scoring by the reference")
        if self._trainer.args.process_index == 0:
            _write(path, scores.chosen, scores.rejected)
        return scores.chosen, scores.rejected

    def _path(self, dataset: Any) -> Path:
        args = self._trainer.args
        digest = hashlib.sha256()
        precision = self._trainer.accelerator.mixed_precision
        for part in (weights_digest(self._trainer.model), data_digest(dataset), str(precision)):
            digest.update(part.encode())
        folder = Path(args.reference_cache or args.output_dir)
        return folder / f"reference_logps-{digest.hexdigest()[:16]}.safetensors"

    def _all_ranks_see(self, path: Path) -> bool:
        if self._trainer.args.world_size == 1:
            return path.exists()
        from accelerate.utils import gather_object

        return all(gather_object([path.exists()]))


def _read(path: Path, count: int) -> tuple[Tensor, Tensor] | None:
    try:
        tensors = load_file(path)
        chosen, rejected = (tensors[column] for column in REFERENCE_COLUMNS)
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("%s cannot be read (%s): its figures are computed anew", path.name, error)
        return None
    if chosen.shape != (count,) or rejected.shape != (count,):
        logger.warning("%s is of another data set: its figures are computed anew", path.name)
        return None
    return chosen, rejected


def _write(path: Path, chosen: Tensor, rejected: Tensor) -> None:
    tensors = dict(
        zip(REFERENCE_COLUMNS, (chosen.contiguous(), rejected.contiguous()), strict=True)
    )
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        # Only time is lost by it, should the run be resumed.
        logger.warning("%s could not be written: %s", path.name, error)
