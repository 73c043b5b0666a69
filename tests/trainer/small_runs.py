"""Runs of four steps with dropout and accumulation, to be broken off and gone on with."""

import hashlib
from typing import Any

from tiny_models import plain_rows, tiny_model, trainer_for, with_lora
from transformers import TrainerCallback

SETTINGS = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 4,
    "learning_rate": 0.01,
    "save_strategy": "steps",
    "save_steps": 2,
}


def trainer(folder: Any, **settings: Any) -> Any:
    """A trainer of the run that writes to a folder; two with the same settings do the same."""
    model = with_lora(tiny_model(), lora_dropout=0.3)
    return trainer_for(model, folder, plain_rows(7), **{**SETTINGS, **settings})


def digests(folder: Any) -> dict[str, str]:
    """A hash of every file of a folder, by its name in it."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# What of a checkpoint is the state of a training: it must be the same bit for bit. The others hold
# figures of speed as well.
STATE = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "scheduler.json",
    "random_0.safetensors",
    "random_0.json",
)


def state_of(folder: Any) -> dict[str, str]:
    """Hashes of the files that hold a training's state."""
    found = digests(folder)
    return {name: found[name] for name in STATE}


class StopAt(TrainerCallback):
    """Ends a training early; its schedule stays that of the whole."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= self.step:
            control.should_training_stop = True
            control.should_save = args.save_strategy != "no"


class SaveEachStep(TrainerCallback):
    """Saves after every step; a resumed run takes `save_steps` from its checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = True
