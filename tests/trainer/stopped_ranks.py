"""A training in each rank of torchrun, slow enough to be stopped; a script for the tests.

`stopped_ranks.py FOLDER` trains twelve steps; each rank writes its process's number to
`FOLDER/pid<rank>` once the third step is done. `stopped_ranks.py FOLDER resume OTHER...` trains
them without a break, and goes on with the others.
"""

import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "data")]

import torch  # noqa: E402
from small_runs import trainer  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from lite_orpo.interruption import StopWithCheckpoint  # noqa: E402

STEPS = 12


class Slowly(TrainerCallback):
    """Says that the third step is done, and takes its time from then on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= 3:
            (self.folder / f"pid{args.process_index}").write_text(str(os.getpid()))
            time.sleep(0.3)


def train(folder: Path, *callbacks: TrainerCallback, resume: bool = False) -> None:
    """The run, or the rest of it."""
    callbacks = (StopWithCheckpoint(), *callbacks)
    torch.manual_seed(0)
    run = trainer(folder / "run", max_steps=STEPS, save_steps=STEPS, callbacks=[*callbacks])
    run.train(resume_from_checkpoint=resume)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *words = sys.argv[1:]
    if words:
        train(Path(folder))
        for other in words[1:]:
            train(Path(other), resume=True)
    else:
        train(Path(folder), Slowly(Path(folder)))
    torch.distributed.destroy_process_group()
