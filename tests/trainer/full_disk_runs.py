"""Trainings and commands on disks of many sizes that are too small; a script for the tests.

The disk is mounted before anything is imported: only a process of one thread may have its own
mounts. What was seen goes to `seen.json`.
"""

import contextlib
import io
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "data")]
    os.environ |= {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": "1"}

from full_disk import PAGE, change_size, mount  # noqa: E402

PLENTY = 64 << 20
SHORT = [
    "max_steps=3",
    "per_device_train_batch_size=2",
    "gradient_accumulation_steps=1",
    "logging_steps=1",
    "eval_strategy=no",
    "sample_prompts=0",
    "eval_before_training=false",
    "overwrite_output_dir=false",
    "save_strategy=steps",
    "save_steps=2",
]


def renew(disk: Path, pages: int) -> None:
    """Empty the disk and give it a size."""
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    change_size(disk, pages * PAGE)


def pages_of(folder: Path) -> int:
    """What a folder takes there; folders themselves and names take none."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // PAGE) for size in sizes)


def trainings(disk: Path) -> list[dict[str, Any]]:
    """Runs that fill the disk in the first save or in the second, and go on with space."""
    from small_runs import state_of, trainer

    from lite_orpo.checkpoint.find import newest_complete
    from lite_orpo.errors import CheckpointError

    renew(disk, PLENTY // PAGE)
    trainer(disk).train()
    needed, seen = pages_of(disk), []
    for share in (0.2, 0.4, 0.7, 0.95):
        renew(disk, int(needed * share))
        message = "none"
        try:
            trainer(disk).train()
        except CheckpointError as error:
            message = str(error)
        found = newest_complete(disk).checkpoint
        change_size(disk, PLENTY)
        trainer(disk).train(resume_from_checkpoint=found is not None)
        seen.append(
            {
                "pages": int(needed * share),
                "message": message,
                "found": found and found.name,
                "state": state_of(disk / "checkpoint-4"),
            }
        )
    return seen


def command(disk: Path, data: list[str], *words: str) -> tuple[int, str]:
    """`lite-orpo train` in this process: its exit code and what stderr says."""
    from lite_orpo.cli.main import run

    given = {word.split("=")[0] for word in words}
    short = [word for word in SHORT if word.split("=")[0] not in given]
    sys.argv = ["lite-orpo", "train", "examples/demo.yaml", *short, *data, *words]
    sys.argv.append(f"output_dir={disk}")
    code, said = 0, io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            run()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except Exception as error:
            code, _ = 1, print(f"a traceback: {error!r}", file=sys.stderr)
    lines = [line for line in said.getvalue().splitlines() if line.strip()]
    return code, "\n".join(line for line in lines if not line.startswith("Failed to load CPU"))


def commands(disk: Path, out: Path) -> dict[str, Any]:
    """The command on disks from one page to one that is large enough, each gone on with."""
    from small_runs import digests

    lines = Path("examples/demo_data/train.jsonl").read_text().splitlines()[:8]
    (out / "pairs.jsonl").write_text("\n".join(lines))
    data = [f"dataset_name={out}/pairs.jsonl", f"eval_dataset_name={out}/pairs.jsonl"]
    renew(disk, PLENTY // PAGE)
    code, error = command(disk, data)
    assert code == 0, error
    needed, weights = pages_of(disk), digests(disk)["adapter_model.safetensors"]
    checkpoint = pages_of(disk / "checkpoint-2")
    seen = []
    sizes = (1, 2, checkpoint // 2, checkpoint + 8, 2 * checkpoint + 8, needed - 15, needed - 1)
    for pages in (0, *sizes):
        renew(disk, max(pages, 1))
        if pages == 0:
            (disk / ".notes").write_bytes(b"x" * PAGE)
        tries = [command(disk, data)]
        change_size(disk, PLENTY)
        last = disk / "checkpoint-3"
        if not (disk / "adapter_model.safetensors").exists() and not last.exists():
            how = "--resume" if list(disk.glob("checkpoint-*")) else "overwrite_output_dir=true"
            tries.append(command(disk, data, how))
        ended = digests(disk)
        at_end = "checkpoint-3/" if "adapter_model.safetensors" not in ended else ""
        entry = {
            "pages": pages,
            "tries": tries,
            "weights": ended[f"{at_end}adapter_model.safetensors"],
        }
        seen.append(entry)
    return {"commands": seen, "weights": weights}


if __name__ == "__main__":
    disk, out = Path(sys.argv[1]), Path(sys.argv[2])
    mount(disk, PLENTY)
    seen = {"trainings": trainings(disk), **commands(disk, out)}
    (out / "seen.json").write_text(json.dumps(seen))
