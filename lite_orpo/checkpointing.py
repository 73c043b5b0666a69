"""CheckpointingTrainer: transformers' Trainer whose checkpoints are complete or absent.

Overridden together are the methods that write and read one: the folder is staged and renamed
(`checkpoint/staging.py`), states are safetensors and JSON (`checkpoint/tensor_tree.py`), and a
run goes on from the newest folder that is what its manifest says (`checkpoint/find.py`). Single
process and data parallelism; what FSDP saves is written by its own libraries, as they do.
"""

import contextlib
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from . import offline_bitsandbytes  # noqa: F401  (before transformers imports it)

# isort: split
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoint.find import newest_complete, rotate, set_aside
from .checkpoint.fingerprint import differences, fingerprint_of, write_fingerprint
from .checkpoint.manifest import why_incomplete
from .checkpoint.optimizer_settings import group_settings, put_changes_over
from .checkpoint.saved_folder import refuse_base_folder, refuse_foreign, refuse_pickles
from .checkpoint.saving_trainer import SavingTrainer
from .checkpoint.staging import put_back, remove_leftovers, staged, staging_folder
from .checkpoint.tensor_tree import load_tree, save_tree
from .checkpoint.writing import write_reason, writing
from .errors import CheckpointError
from .interruption import EvaluationCut, StopWithCheckpoint
from .step.length_order import LengthOrder
from .step.random_state import RandomState

logger = logging.getLogger(__name__)

_OPTIMIZER, _SCHEDULER, _SCALER, _RANDOM = "optimizer", "scheduler", "scaler", "random"


class CheckpointingTrainer(SavingTrainer):
    """The part of `ORPOTrainer` that saves and goes on."""

    control: Any

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; see transformers' Trainer.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of `output_dir`, or
                the folder of one.
            kwargs: as in transformers.

        Checkpoints of an earlier run in `output_dir` that is not gone on with are set aside under
        another name, with a warning.

        Raises:
            CheckpointError: there is no complete checkpoint to go on from, or the one that is
                named is none; or `output_dir` holds weights or checkpoints of something else, or
                is the base model's own folder.
        """
        checkpoint = self._resolve(resume_from_checkpoint) or None
        begun_with = getattr(self, "_fingerprint", {}).get("base weights")
        self._fingerprint = fingerprint_of(self)
        if checkpoint is not None and begun_with is not None:  # this trainer has moved them since
            self._fingerprint["base weights"] = begun_with
        if not self._leaves_saving_to_library():
            self._prepare_folder(checkpoint)
        elif self.is_world_process_zero():
            logger.warning(
                "checkpoints of a sharded model (FSDP) are written and read by FSDP's own "
                "libraries: not staged, without a manifest, and not compared with the run"
            )
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        except EvaluationCut:
            # The step before the evaluation is whole.
            self._save_checkpoint(self.model, None)
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            return None
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, StopWithCheckpoint):
                    callback.stop_listening()

    def _prepare_folder(self, checkpoint: str | None) -> None:
        """Compare what is gone on from with this run, and set later checkpoints aside."""
        output_dir = Path(self.args.output_dir)
        is_own = (
            checkpoint is not None and Path(checkpoint).resolve().parent == output_dir.resolve()
        )
        saves = self.args.save_strategy != "no"
        if saves:
            refuse_base_folder(output_dir, self._base_name())
            if not is_own:
                refuse_foreign(output_dir)
        if checkpoint is not None:
            refuse_pickles(Path(checkpoint))
            self._compare(Path(checkpoint))
            self._refuse_later(Path(checkpoint))
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        remove_leftovers(output_dir)
        if is_own or saves:
            names = set_aside(output_dir, Path(checkpoint if is_own and checkpoint else ""))
            whose = f"later steps than {Path(checkpoint).name}" if checkpoint else "an earlier run"
            if names:
                logger.warning("checkpoints of %s are set aside: %s", whose, ", ".join(names))

    def _refuse_later(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        if 0 < self.args.max_steps < state["global_step"]:
            raise CheckpointError(
                f"{checkpoint.name} is beyond the end of the run (max_steps "
                f"{self.args.max_steps}); raise max_steps, or name an earlier checkpoint"
            )

    def _resolve(self, wanted: str | bool | None) -> str | None:
        if wanted is None or wanted is False or self._leaves_saving_to_library():
            return wanted  # type: ignore[return-value]
        if wanted is not True:
            put_back(Path(wanted).parent)
            reason = why_incomplete(Path(wanted))
            if reason is not None:
                raise CheckpointError(
                    f"{wanted} is no complete checkpoint: {reason}; name another, or set "
                    "resume_from_checkpoint: true for the newest complete one"
                )
            return str(wanted)
        found = newest_complete(Path(self.args.output_dir))
        for name, reason in found.passed_over:
            logger.warning("%s is passed over: %s", name, reason)
        if found.checkpoint is None:
            raise CheckpointError(
                f"{self.args.output_dir} has no complete checkpoint to go on from; start anew "
                "without resume_from_checkpoint"
            )
        return str(found.checkpoint)

    def _compare(self, checkpoint: Path) -> None:
        parts, versions, _ = differences(checkpoint, self._fingerprint)
        if versions:
            logger.warning("%s was written with %s", checkpoint.name, "; ".join(versions))
        if not parts:
            return
        what = f"{checkpoint.name} is of a run that differs in: {', '.join(parts)}"
        kind = next((part for part in parts if part.startswith("optimizer")), None)
        if kind is not None and "not noted" not in kind:
            raise CheckpointError(f"{what}; its state is of no use to another optimiser: set optim")
        if not self.args.resume_despite_changes:
            raise CheckpointError(
                f"{what}; go on with what it was made from, or set resume_despite_changes: true"
            )
        logger.warning("%s; resume_despite_changes is set", what)

    def _leaves_saving_to_library(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if self._leaves_saving_to_library():
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
                self._write_state(Path(self._get_output_dir(trial=trial), name))
            return
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run_dir = Path(self._get_output_dir(trial=trial))
        final = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        advice = "earlier checkpoints are as they were: mend that, and go on with "
        with writing(final.name, advice + "resume_from_checkpoint: true"):
            self._write_checkpoint(run_dir, final)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            keep = {final} if best is None else {final, run_dir / Path(best).name}
            rotate(run_dir, self.args.save_total_limit, keep)

    def _write_checkpoint(self, run_dir: Path, final: Path) -> None:
        if not self.args.should_save:
            self.accelerator.wait_for_everyone()  # until the first rank has made the folder
            if not self.args.save_only_model:
                self._save_random_state(staging_folder(final))
            self.accelerator.wait_for_everyone()
            return
        with staged(final) as folder:
            self.save_model(str(folder), _internal_call=True)
            self._note_best(run_dir, final)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(folder))
                self._save_scaler(str(folder))
                self._save_random_state(folder)
            write_fingerprint(folder, self._fingerprint)
            self._note_callbacks()
            self._write_state(folder)
            self.accelerator.wait_for_everyone()
            self.accelerator.wait_for_everyone()  # until the others' random states are there

    def _note_best(self, run_dir: Path, final: Path) -> None:
        if not self.state.best_global_step:
            return
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == final or best.exists():
            self.state.best_model_checkpoint = str(best)

    def _note_callbacks(self) -> None:
        states: dict[str, list[Any]] = {}
        for callback in (*self.callback_handler.callbacks, self.control):
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        for name, own in states.items():
            self.state.stateful_callbacks[name] = own if len(own) > 1 else own[0]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._leaves_saving_to_library():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        save_tree(self.optimizer.state_dict(), Path(output_dir, _OPTIMIZER))
        save_tree(self.lr_scheduler.state_dict(), Path(output_dir, _SCHEDULER))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None:
            save_tree(scaler.state_dict(), Path(output_dir, _SCALER))

    def _save_random_state(self, folder: Path) -> None:
        save_tree(tuple(RandomState.now()), folder / f"{_RANDOM}_{self.args.process_index}")

    # ---- going on ----

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(super()._init_training_state).bind(*args, **kwargs).arguments
        checkpoint = given["resume_from_checkpoint"]
        if checkpoint is None:
            return super()._init_training_state(*args, **kwargs)
        # Trainer takes the best checkpoint's name for a path from where the process runs.
        with _unheard(logging.getLogger("transformers.trainer"), "The best checkpoint"):
            begun = super()._init_training_state(*args, **kwargs)
        self.state.best_model_checkpoint = self._find_best(Path(checkpoint))
        return begun

    def _find_best(self, checkpoint: Path) -> str | None:
        """Where the best checkpoint so far is now: beside the one that is gone on from."""
        if not self.state.best_global_step:
            return None
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        for folder in (checkpoint.parent, Path(self.args.output_dir)):
            if (folder / name).is_dir():
                return str(folder / name)
        if self.args.load_best_model_at_end:
            logger.warning("%s, the best so far, is not there any more", name)
        return None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        # Gone on from the last step: what comes after the steps is all that is missing.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(rows)
        args = self.args
        lengths = rows["length"] if hasattr(rows, "column_names") else [r["length"] for r in rows]
        return LengthOrder(
            list(lengths),
            self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            args.seed if args.data_seed is None else args.data_seed,
            # Not set_epoch: accelerate does not hand it on where batches are skipped.
            lambda: int(self.state.epoch or 0),
        )

    def _load_callback_state(self) -> None:
        """Callbacks (early stopping) go on with their counts, under the settings they have now."""
        if self.args.restore_callback_states_from_checkpoint:
            super()._load_callback_state()
            return
        for name, noted in self.state.stateful_callbacks.items():
            states = noted if isinstance(noted, list) else [noted]
            own = [c for c in self.callback_handler.callbacks if type(c).__name__ == name]
            for callback, state in zip(own, states, strict=False):
                for attribute, value in state.get("attributes", {}).items():
                    setattr(callback, attribute, value)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._leaves_saving_to_library():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        own = group_settings(self.optimizer)
        with _reading(checkpoint):
            self.optimizer.load_state_dict(load_tree(Path(checkpoint, _OPTIMIZER)))
            self.lr_scheduler.load_state_dict(load_tree(Path(checkpoint, _SCHEDULER)))
        changes = differences(Path(checkpoint), self._fingerprint).settings
        put_changes_over(changes, own, self.optimizer, self.lr_scheduler)

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if checkpoint is None or scaler is None:
            return
        with _reading(checkpoint):
            scaler.load_state_dict(load_tree(Path(checkpoint, _SCALER)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._leaves_saving_to_library():
            super()._load_rng_state(checkpoint)
            return
        stem = Path(checkpoint, f"{_RANDOM}_{self.args.process_index}")
        if not stem.with_suffix(".json").exists():
            logger.warning(
                "%s was written by fewer ranks: the random state of rank %d begins anew",
                Path(checkpoint).name,
                self.args.process_index,
            )
            return
        with _reading(checkpoint):
            RandomState(*load_tree(stem)).put_back()


@contextlib.contextmanager
def _unheard(library: logging.Logger, beginning: str) -> Iterator[None]:
    def is_heard(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    library.addFilter(is_heard)
    try:
        yield
    finally:
        library.removeFilter(is_heard)


@contextlib.contextmanager
def _reading(checkpoint: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint} does not fit this run ({write_reason(error)}): it was saved without its "
            "training state (save_only_model), or with another optimiser or adapter"
        ) from error
