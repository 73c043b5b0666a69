"""SavingTrainer: transformers' Trainer whose saved folders can be shared as they are.

No pickle of the arguments is written, in which Trainer's own saving and pushing put the token; the
base model's local path is in no file; and the base model's own folder is never written.
"""

import copy
import shutil
from pathlib import Path
from typing import Any

from .. import offline_bitsandbytes  # noqa: F401  (before transformers imports it)

# isort: split
from huggingface_hub import upload_folder
from huggingface_hub.errors import HTTPError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from transformers.utils import PushInProgress

from ..errors import HubError
from ..model.head import innermost_causal_lm
from .fingerprint import write_fingerprint
from .saved_folder import files_to_share, make_public, refuse_base_folder


class SavingTrainer(Trainer):
    """The part of `ORPOTrainer` that writes models and model cards, and uploads them."""

    _fingerprint: dict[str, Any]
    push_in_progress: Any

    def _write_state(self, folder: Path) -> None:
        """Write the trainer's state, with the best checkpoint's name alone: folders get moved."""
        state = copy.copy(self.state)
        if state.best_model_checkpoint is not None:
            state.best_model_checkpoint = Path(state.best_model_checkpoint).name
        state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def save_state(self) -> None:
        """Write `trainer_state.json` into `output_dir`."""
        if self.is_world_process_zero():
            self._write_state(Path(self.args.output_dir))

    def init_hf_repo(self, *args: Any, **kwargs: Any) -> None:
        """Open the hub repository that is pushed to; see transformers' Trainer.

        Raises:
            HubError: the hub does not: no network, not logged in, or a name that it refuses.
        """
        try:
            super().init_hf_repo(*args, **kwargs)
        except (OSError, HTTPError, ValueError) as error:
            name = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
            reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
            raise HubError(
                f"{name!r} cannot be pushed to the hub ({reason}); check the network "
                "and `hf auth login`. save_model() writes the model here"
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model or adapter and tokenizer.

        Args:
            output_dir: where; default: the configured one. What an earlier saving left is replaced.
            _internal_call: transformers'.

        Raises:
            CheckpointError: it is the folder that the base model was loaded from.
        """
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        refuse_base_folder(folder, self._base_name())
        super().save_model(output_dir, _internal_call)
        fingerprint = getattr(self, "_fingerprint", None)
        if self.args.should_save and not _internal_call and fingerprint is not None:
            write_fingerprint(folder, fingerprint)  # by which the next run knows it for ours

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save model and tokenizer as Trainer does, without its pickle of the arguments."""
        if not self.args.should_save and not getattr(
            self, "is_distributed_loading_by_transformers", False
        ):
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        model.save_pretrained(
            str(folder), state_dict=state_dict, is_main_process=self.args.should_save
        )
        if self.args.should_save:
            self.processing_class.save_pretrained(str(folder))
            make_public(folder, list(getattr(model, "peft_config", {})))

    def _base_name(self) -> str | None:
        return getattr(innermost_causal_lm(self.model), "name_or_path", None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write a draft of a model card; see transformers' Trainer."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            make_public(Path(self.args.output_dir), [])

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's model as Trainer does, without its pickle of the arguments."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_pushing and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        for path in files_to_share(Path(checkpoint_folder)):
            shutil.copy(path, Path(args.output_dir, path.name))

        def upload(folder: str, **options: Any) -> Any:
            return upload_folder(
                repo_id=self.hub_model_id,
                folder_path=folder,
                commit_message=f"Training in progress, step {self.state.global_step}",
                token=args.hub_token,
                run_as_future=True,
                revision=args.hub_revision,
                **options,
            )

        ignored = ["_*", ".*", f"{PREFIX_CHECKPOINT_DIR}-*"]
        jobs = [upload(args.output_dir, ignore_patterns=ignored)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            is_last = args.hub_strategy == HubStrategy.CHECKPOINT
            place = "last-checkpoint" if is_last else Path(checkpoint_folder).name
            jobs.append(upload(checkpoint_folder, path_in_repo=place))
        if is_pushing:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
