"""What ORPOTrainer leaves: no pickle, no token, no absolute path; and nothing of others is lost."""

import json
import logging
from pathlib import Path

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import TOKENIZER, plain_rows, tiny_model, trainer_for, with_lora
from transformers import AutoModelForCausalLM, TrainerCallback

from lite_orpo.errors import CheckpointError

SECRET = "hf_secretsecretsecret"
# The highest loss is the best here, so that the first step's checkpoint is kept beside the last.
BEST = {
    "max_steps": 4,
    "learning_rate": 0.05,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "load_best_model_at_end": True,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "save_total_limit": 1,
    "hub_token": SECRET,
}
SAVING = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}


class Death(TrainerCallback):
    """Ends the run in its third step, as a process ends that is killed."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def no_pickle(monkeypatch):
    """Trainer writes its arguments by torch.save; nothing here may."""

    def refuse(*given, **options):
        raise AssertionError("a pickle is written")

    monkeypatch.setattr(torch, "save", refuse)


@pytest.fixture
def base(tmp_path):
    """A base model's folder; its path is what must be nowhere."""
    folder = tmp_path / "zq_some_user" / "base"
    tiny_model().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def best_trainer(base, folder, **extra):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    model = with_lora(model, lora_dropout=0.2)
    return trainer_for(model, folder, eval_dataset=plain_rows(3), **{**BEST, **extra})


def files_with(folder, word):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [path for path in files if word.encode() in path.read_bytes()]


def test_no_path_and_no_token_in_checkpoints_states_and_saved_models(base, tmp_path):
    run = base.parent / "run"
    trainer = best_trainer(base, run)
    trainer.train()
    trainer.save_model()
    trainer.save_model(str(run / "copy"))
    trainer.save_state()
    assert {"checkpoint-1", "copy", "trainer_state.json"} <= {p.name for p in run.iterdir()}
    assert files_with(run, "zq_some_user") == []
    assert files_with(run, SECRET) == []
    state = json.loads((run / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == "checkpoint-1"
    # In memory it stays a path that can be opened.
    assert trainer.state.best_model_checkpoint == str(run / "checkpoint-1")
    assert trainer.model.peft_config["default"].base_model_name_or_path == str(base)
    again = PeftModel.from_pretrained(tiny_model(), run / "copy")
    assert any("lora_" in name for name, _ in again.named_parameters())


def test_a_run_whose_folder_was_moved_goes_on_and_ends_bit_for_bit(base, tmp_path, monkeypatch):
    unbroken = best_trainer(base, tmp_path / "unbroken")
    unbroken.train()
    with pytest.raises(KeyboardInterrupt):
        best_trainer(base, tmp_path / "there", callbacks=[Death()]).train()
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "there").rename(tmp_path / "elsewhere" / "here")
    assert {"checkpoint-1", "checkpoint-2"} <= {path.name for path in moved.iterdir()}
    (tmp_path / "checkpoint-1").mkdir()
    monkeypatch.chdir(tmp_path)  # where a name alone would be another folder
    resumed = best_trainer(base, moved)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(moved / "checkpoint-1")
    left = [load_file(f / "checkpoint-1/adapter_model.safetensors")
            for f in (tmp_path / "unbroken", moved)]  # fmt: skip
    assert all(torch.equal(left[0][name], left[1][name]) for name in left[0])
    ours, theirs = resumed.model.state_dict(), unbroken.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not (tmp_path / "there").exists()


def test_the_best_checkpoint_is_found_beside_the_one_that_is_gone_on_from(base, tmp_path, caplog):
    with pytest.raises(KeyboardInterrupt):
        best_trainer(base, tmp_path / "first", callbacks=[Death()]).train()
    moved = (tmp_path / "first").rename(tmp_path / "moved")
    resumed = best_trainer(base, tmp_path / "second")
    resumed.train(resume_from_checkpoint=str(moved / "checkpoint-2"))
    assert resumed.state.best_model_checkpoint == str(moved / "checkpoint-1")
    kept = load_file(moved / "checkpoint-1" / "adapter_model.safetensors")
    name = next(name for name in kept if "lora_B" in name)
    now = resumed.model.state_dict()[name.replace(".weight", ".default.weight")]
    assert torch.equal(now, kept[name])
    assert "does not exist anymore" not in caplog.text


def test_a_relative_base_stays_as_it_was_typed(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    model = with_lora(AutoModelForCausalLM.from_pretrained("./base", dtype=torch.float32))
    trainer_for(model, tmp_path / "run").save_model(str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "./base"


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_a_hub_name_stays_in_adapter_and_card(tmp_path):
    model = tiny_model()
    model.config._name_or_path = model.name_or_path = "someone/model"
    trainer_for(with_lora(model), tmp_path / "run").save_model(str(tmp_path / "out"))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "someone/model"
    assert "base_model: someone/model" in (tmp_path / "out" / "README.md").read_text()


# ---- uploading; the hub is not here, so the calls are looked at ----


class Done:
    def done(self):
        return True


@pytest.fixture
def uploads(monkeypatch):
    seen = []

    def upload(folder_path, ignore_patterns=(), **options):
        seen.append((sorted(path.name for path in Path(folder_path).iterdir()), options))
        return Done()

    class Hub:
        upload_folder = staticmethod(upload)

        def create_repo(self, name, **options):
            return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{name}")

    monkeypatch.setattr("lite_orpo.checkpoint.saving_trainer.upload_folder", upload)
    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    return seen


def test_pushing_uploads_no_pickle_and_no_path(base, uploads):
    run = base.parent / "run"
    trainer = best_trainer(base, run, push_to_hub=True, hub_strategy="all_checkpoints")
    trainer.train()
    trainer.push_to_hub()
    messages = [options["commit_message"] for _, options in uploads]
    assert messages[0] == "Training in progress, step 1" and messages[-1] == "End of training"
    places = [options.get("path_in_repo") for _, options in uploads]
    assert places.count("checkpoint-1") == 1
    names = set().union(*(names for names, _ in uploads))
    assert "adapter_model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    assert files_with(run, "zq_some_user") == []
    assert files_with(run, SECRET) == []


# ---- whose folder it is ----


def refusal(call):
    with pytest.raises(CheckpointError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_cell_can_be_run_again_and_nothing_of_the_first_time_is_lost(tmp_path, caplog):
    def cell():
        trainer = trainer_for(with_lora(tiny_model()), tmp_path / "run", **SAVING)
        trainer.train()
        trainer.save_model()

    cell()
    first = load_file(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors")
    with caplog.at_level(logging.WARNING, "lite_orpo"):
        cell()
    assert "checkpoints of an earlier run are set aside: checkpoint-1.superseded" in caplog.text
    kept = load_file(tmp_path / "run" / "checkpoint-2.superseded" / "adapter_model.safetensors")
    assert all(torch.equal(first[name], kept[name]) for name in first)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


@pytest.mark.parametrize(
    "name", ["model.safetensors", "adapter_model.bin", "pytorch_model.bin", "checkpoint-3"]
)
def test_what_another_program_wrote_is_refused_before_the_first_step(name, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("theirs")
    trainer = trainer_for(with_lora(tiny_model()), tmp_path / "run", **SAVING)
    message = refusal(trainer.train)
    assert f"holds {name}, which lite-orpo did not write" in message
    assert trainer.state.global_step == 0
    assert (tmp_path / "run" / name).read_text() == "theirs"


def test_the_base_models_own_folder_is_not_written(base):
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = trainer_for(model, base, **SAVING)
    assert "base model's own folder" in refusal(trainer.train)
    assert "base model's own folder" in refusal(trainer.save_model)
    assert {path: path.read_bytes() for path in base.rglob("*") if path.is_file()} == before
