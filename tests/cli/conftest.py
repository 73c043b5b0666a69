"""`lite-orpo train` run in this process, on a few of the demo's pairs."""

import io
import signal
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


@pytest.fixture(autouse=True)
def interruptible():
    """Ctrl-C is heard here, though a shell that runs the tests in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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


@pytest.fixture(scope="session")
def demo_run(tmp_path_factory):
    """A folder as a run of the demo leaves it, its adapter made at random instead of trained."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("runs") / "demo"
    model_folder = ROOT / "examples/demo_model"
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    held_out = folder.parent / "held_out.jsonl"
    lines = (ROOT / "examples/demo_data/heldout.jsonl").read_text().splitlines()[:12]
    held_out.write_text("\n".join(lines))
    settings = f"model_name_or_path: {model_folder}\nbeta: 0.2\nmax_length: 128\n"
    settings += f"dataset_name: nowhere.jsonl\neval_dataset_name: {held_out}\n"
    (folder / "config.resolved.yaml").write_text(settings + f"output_dir: {folder}\n")
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run a command in this process; returns (exit code, what stdout said, what stderr said)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*words: str, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lite-orpo", *map(str, words)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = 0
        try:
            run()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return call
