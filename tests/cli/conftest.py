"""`lite-orpo train` run in this process, on a few of the demo's pairs."""

import sys
from pathlib import Path

import pytest

from lite_orpo.cli.main import run

ROOT = Path(__file__).parents[2]
SHORT = [
    "max_steps=4",
    "per_device_train_batch_size=2",
    "gradient_accumulation_steps=1",
    "logging_steps=1",
    "eval_strategy=no",
    "sample_prompts=0",
    "save_plots=false",
]


@pytest.fixture
def train(tmp_path, monkeypatch, capsys):
    """Run the command in this process; returns (exit code, what stderr said, output folder).

    What stdout said is in `train.output`.
    """
    monkeypatch.chdir(ROOT)
    data = tmp_path / "pairs.jsonl"
    lines = (ROOT / "examples/demo_data/train.jsonl").read_text().splitlines()[:20]
    data.write_text("\n".join(lines))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text("\n".join(lines[:4]))
    folder = tmp_path / "out"

    def call(*words: str) -> tuple[int, str, Path]:
        command = ["lite-orpo", "train", "examples/demo.yaml", *SHORT]
        command += ["overwrite_output_dir=false", f"output_dir={folder}"]
        given = {word.split("=")[0] for word in words}
        command = [word for word in command if word.split("=")[0] not in given]
        command += [f"dataset_name={data}"] * ("dataset_name" not in given)
        command += [f"eval_dataset_name={held_out}"] * ("eval_dataset_name" not in given)
        monkeypatch.setattr(sys, "argv", [*command, *words])
        code = 0
        try:
            run()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        said = capsys.readouterr()
        call.output = said.out
        return code, said.err, folder

    return call
