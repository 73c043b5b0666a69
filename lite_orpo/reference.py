"""The reference of DPO and IPO: the same model before training, its log-probabilities kept.

With an adapter the reference is the model with the adapter switched off; without one, the weights
that the training begins with. Each pair passes it once; what comes out goes into the data set as
two columns and into a file, which a resumed run, or another run with the same model and pairs,
reads. No second model is loaded. An adapter that begins with something learnt before is switched
off as a whole: the reference is the base, and the log says so.
"""

import contextlib
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint.fingerprint import data_digest, weights_digest
from .data.row_batch import REFERENCE_COLUMNS
from .errors import ConfigError
from .model.adapter import adapter_switched_off
from .pair_scores import score_pairs
from .step.row_room import RowRoom

logger = logging.getLogger(__name__)

# PEFT takes out of the base weights what it puts into the adapter.
_MOVES_BASE_WEIGHTS = ("pissa", "olora", "corda", "lora_ga")


class Reference:
    """Gives data sets the reference's log-probabilities.

    It does not hold the trainer: a cycle would keep a model in memory that nobody uses any more.

    Args:
        room: tokens that a row may have.
    """

    def __init__(self, room: RowRoom) -> None:
        self._room = room
        self._is_gone = False
        self.seconds = 0.0
        """What scoring took; of figures that were kept, when they were computed."""

    def begin_training(self, trainer: Any) -> None:
        """From here on, weights that train in full are no longer the reference's.

        Says it where an adapter changes the model before its first step.
        """
        self._is_gone = not _has_adapter(trainer)
        if not self._is_gone and trainer.objective.kind.uses_reference:
            self._tell_of_earlier_training(trainer)

    def _tell_of_earlier_training(self, trainer: Any) -> None:
        pairs = trainer.train_dataset
        if pairs is None or not len(pairs):
            return
        first = pairs.select([0]) if hasattr(pairs, "select") else pairs[:1]
        by_reference = float(first[0][REFERENCE_COLUMNS[0]])
        now = float(score_pairs(trainer, self._room, first, "Scoring").chosen[0])
        # A fresh adapter adds zeros; half precision rounds other rows otherwise.
        if abs(now - by_reference) > 0.05 + 0.005 * abs(by_reference):
            logger.warning(
                "the adapter changes the model before the first step: the reference of %s is the "
                "base with the adapter off; to compare with what was trained before, merge it into "
                "the base and train a new adapter",
                trainer.args.loss_type,
            )

    def on(self, trainer: Any, dataset: Any) -> Any:
        """The data set with the reference's columns; as it is, where the loss needs none.

        Args:
            trainer: an `ORPOTrainer`.
            dataset: from `prepare_pairs`, or a mapping of names to such, or None.

        Raises:
            ConfigError: the reference is gone, for it is what has been trained, or was never
                there, for the adapter holds a part of the base weights.
        """
        if dataset is None or not trainer.objective.kind.uses_reference:
            return dataset
        if isinstance(dataset, dict):
            return {name: self.on(trainer, part) for name, part in dataset.items()}
        if len(dataset) == 0 or REFERENCE_COLUMNS[0] in dataset[0]:
            return dataset
        if trainer.equal_rows:
            raise ConfigError(
                f"loss_type {trainer.args.loss_type} is not supported with FSDP: its reference "
                "passes the pairs rank by rank; use orpo, simpo or cpo, or plain data parallelism"
            )
        if self._is_gone:
            raise ConfigError(
                f"loss_type {trainer.args.loss_type} compares with the model before its "
                "training, which is gone; give these pairs to the trainer as eval_dataset"
            )
        _refuse_moved_weights(trainer)
        chosen, rejected = self._logps(trainer, dataset)
        columns = dict(zip(REFERENCE_COLUMNS, (chosen, rejected), strict=True))
        if hasattr(dataset, "add_column"):
            for name, values in columns.items():
                dataset = dataset.add_column(name, values.numpy())
            return dataset
        return [
            {**row, **{name: float(values[i]) for name, values in columns.items()}}
            for i, row in enumerate(dataset)
        ]

    def _logps(self, trainer: Any, dataset: Any) -> tuple[Tensor, Tensor]:
        path = _path(trainer, dataset)
        kept = _read(path, len(dataset)) if _all_ranks_see(trainer, path) else None
        if kept is not None:
            logger.info("the reference's log-probabilities are read from %s", path.name)
            self.seconds += kept.seconds
            return kept.chosen, kept.rejected
        started = time.perf_counter()
        switch_off = adapter_switched_off if _has_adapter(trainer) else contextlib.nullcontext
        with switch_off(trainer.model):
            scores = score_pairs(trainer, self._room, dataset, "Scoring by the reference")
        took = time.perf_counter() - started
        self.seconds += took
        if trainer.args.process_index == 0:
            _write(path, _Kept(scores.chosen, scores.rejected, took))
        return scores.chosen, scores.rejected


def _has_adapter(trainer: Any) -> bool:
    return hasattr(trainer.model, "disable_adapter")


def _refuse_moved_weights(trainer: Any) -> None:
    for config in getattr(trainer.model, "peft_config", {}).values():
        init = str(getattr(config, "init_lora_weights", "")).lower()
        if init.startswith(_MOVES_BASE_WEIGHTS):
            raise ConfigError(
                f"loss_type {trainer.args.loss_type} compares with the model with its adapter "
                f"switched off, but init_lora_weights={init!r} moves a part of the base weights "
                "into the adapter; use another initialisation"
            )


def _path(trainer: Any, dataset: Any) -> Path:
    args = trainer.args
    digest = hashlib.sha256()
    precision = str(trainer.accelerator.mixed_precision)
    for part in (weights_digest(trainer.model), data_digest(dataset), precision):
        digest.update(part.encode())
    folder = Path(args.reference_cache or args.output_dir)
    return folder / f"reference_logps-{digest.hexdigest()[:16]}.safetensors"


def _all_ranks_see(trainer: Any, path: Path) -> bool:
    if trainer.args.world_size == 1:
        return path.exists()
    from accelerate.utils import gather_object

    return all(gather_object([path.exists()]))


class _Kept(NamedTuple):
    chosen: Tensor
    rejected: Tensor
    seconds: float


def _read(path: Path, count: int) -> _Kept | None:
    try:
        with safe_open(path, "pt") as file:
            chosen, rejected = (file.get_tensor(column) for column in REFERENCE_COLUMNS)
            seconds = float((file.metadata() or {}).get("seconds", 0.0))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        logger.warning("%s cannot be read (%s): its figures are computed anew", path.name, error)
        return None
    if chosen.shape != (count,) or rejected.shape != (count,):
        logger.warning("%s is of another data set: its figures are computed anew", path.name)
        return None
    return _Kept(chosen, rejected, seconds)


def _write(path: Path, kept: _Kept) -> None:
    logps = (kept.chosen.contiguous(), kept.rejected.contiguous())
    tensors = dict(zip(REFERENCE_COLUMNS, logps, strict=True))
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, partial, {"seconds": f"{kept.seconds:.2f}"})
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        # Only time is lost by it, should the run be resumed.
        logger.warning("%s could not be written: %s", path.name, error)
