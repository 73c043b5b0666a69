"""CheckpointingTrainer: transformers' Trainer whose checkpoints are complete or absent.

Overridden together are the methods that write and read one: the folder is staged and renamed
(`checkpoint/staging.py`), states are safetensors and JSON (`checkpoint/tensor_tree.py`), and a
run goes on from the newest folder that is what its manifest says (`checkpoint/find.py`). Single
process and data parallelism; what FSDP saves is written by its own libraries, as they do.
"""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from . import offline_bitsandbytes  # noqa: F401  (before transformers imports it)

# isort: split
from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .checkpoint.find import newest_complete, rotate, set_aside
from .checkpoint.manifest import why_incomplete
from .checkpoint.staging import put_back, remove_leftovers, staged, staging_folder
from .checkpoint.tensor_tree import load_tree, save_tree
from .errors import CheckpointError
from .fingerprint import differences, fingerprint_of, write_fingerprint
from .interruption import EvaluationCut, StopWithCheckpoint
from .random_state import RandomState
from .writing import write_reason, writing

logger = logging.getLogger(__name__)

_OPTIMIZER, _SCHEDULER, _SCALER, _RANDOM = "optimizer", "scheduler", "scaler", "random"


class CheckpointingTrainer(Trainer):
    """The part of `ORPOTrainer` that saves and goes on."""

    control: Any
    _fingerprint: dict[str, Any]

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train; see transformers' Trainer.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint of `output_dir`, or
                the folder of one.
            kwargs: as in transformers.

        Raises:
            CheckpointError: there is no complete checkpoint to go on from, or the one that is
                named is none.
        """
        checkpoint = self._resolve(resume_from_checkpoint) or None
        self._fingerprint = fingerprint_of(self)
        if not self._leaves_saving_to_library():
            self._prepare_folder(checkpoint)
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
        if checkpoint is not None:
            self._compare(Path(checkpoint))
            self._refuse_finished(Path(checkpoint))
        self.accelerator.wait_for_everyone()
        if not self.args.should_save:
            return
        remove_leftovers(output_dir)
        if checkpoint is not None and Path(checkpoint).resolve().parent == output_dir.resolve():
            names = set_aside(output_dir, Path(checkpoint))
            if names:
                logger.warning(
                    "checkpoints of later steps than %s are set aside: %s",
                    Path(checkpoint).name,
                    ", ".join(names),
                )

    def _refuse_finished(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        if 0 < self.args.max_steps <= state["global_step"]:
            raise CheckpointError(
                f"{checkpoint.name} is the end of the run already (max_steps "
                f"{self.args.max_steps}): its weights are in that folder; to go on, raise max_steps"
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
        parts, versions = differences(checkpoint, self._fingerprint)
        if versions:
            logger.warning("%s was written with %s", checkpoint.name, "; ".join(versions))
        if not parts:
            return
        what = f"{checkpoint.name} is of a run that differs in: {', '.join(parts)}"
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
            self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            self.accelerator.wait_for_everyone()  # until the others' random states are there

    def _note_best(self, run_dir: Path, final: Path) -> None:
        if not self.state.best_global_step:
            return
        best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == final or best.exists():
            self.state.best_model_checkpoint = str(best)

    def _note_callbacks(self) -> None:
        for callback in (*self.callback_handler.callbacks, self.control):
            if not isinstance(callback, ExportableState):
                continue
            name = type(callback).__name__
            states = self.state.stateful_callbacks
            if isinstance(states.get(name), list):
                states[name].append(callback.state())
            else:
                states[name] = callback.state()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save model and tokenizer, without Trainer's pickled arguments.

        They hold the hub's token, and on a full disk torch fails at them with no word of it.
        """
        folder = str(output_dir if output_dir is not None else self.args.output_dir)
        is_sharded = self._leaves_saving_to_library() or self.is_distributed_loading_by_transformers
        if is_sharded or not isinstance(self.model, (PreTrainedModel, PeftModel)):
            super()._save(folder, state_dict)
            Path(folder, TRAINING_ARGS_NAME).unlink(missing_ok=True)
        elif self.args.should_save:
            self.model.save_pretrained(folder, state_dict=state_dict)
            self.processing_class.save_pretrained(folder)

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

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._leaves_saving_to_library():
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        with _reading(checkpoint):
            self.optimizer.load_state_dict(load_tree(Path(checkpoint, _OPTIMIZER)))
            self.lr_scheduler.load_state_dict(load_tree(Path(checkpoint, _SCHEDULER)))

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
def _reading(checkpoint: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(
            f"{checkpoint} does not fit this run ({write_reason(error)}): it was saved without its "
            "training state (save_only_model), or with another optimiser or adapter"
        ) from error
