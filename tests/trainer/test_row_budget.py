"""`max_tokens_per_row: auto` goes by the memory that is free; the report tells what was taken."""

import io
import sys

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_model, trainer_for, with_lora

from lite_orpo.cli.memory_report import print_memory
from lite_orpo.config.options import DataOptions, LoraOptions, ModelOptions, ReportOptions
from lite_orpo.config.run_config import RunConfig
from lite_orpo.errors import ConfigError, ModelError
from lite_orpo.memory import device as device_memory
from lite_orpo.memory.device import PeakMemory, free_bytes
from lite_orpo.memory.plan import MemoryPlan, row_tokens_that_fit
from lite_orpo.step import row_budget

MIB = 2**20
SHAPE = {"max_position_embeddings": 4096, "num_hidden_layers": 4, "hidden_size": 128}


def plan(size):
    return MemoryPlan((), 0, 0, size)


def test_the_budget_is_halved_until_it_fits_and_not_below_the_longest_pair():
    tried = []

    def plan_for(tokens):
        tried.append(tokens)
        return plan(tokens)

    assert row_tokens_that_fit(plan_for, lambda p: p.step <= 600, 2048, 100)[0] == 512
    assert tried == [2048, 1024, 512]
    assert row_tokens_that_fit(plan_for, lambda p: True, 2048, 100)[0] == 2048
    assert row_tokens_that_fit(plan_for, lambda p: False, 2048, 300)[0] == 300
    assert row_tokens_that_fit(plan_for, lambda p: False, 100, 300)[0] == 100


def long_rows(count):
    return [
        {"prompt": f"{i:02d}" * 50, "chosen": "good " * 10, "rejected": "bad " * 12}
        for i in range(count)
    ]


def auto_trainer(folder, monkeypatch, free, **settings):
    monkeypatch.setattr(row_budget, "free_bytes", lambda device: free)
    settings = {"max_tokens_per_row": "auto", "per_device_train_batch_size": 8, **settings}
    return trainer_for(with_lora(tiny_model(**SHAPE)), folder, long_rows(16), **settings)


def test_less_memory_makes_shorter_rows_and_the_same_training(tmp_path, monkeypatch):
    runs = {}
    for name, free in (("roomy", 64 * 2**30), ("tight", 45 * MIB)):
        trainer = auto_trainer(
            tmp_path / name, monkeypatch, free, max_steps=2, learning_rate=1e-3,
        )  # fmt: skip
        trainer.train()
        logs = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        runs[name] = (trainer.planner.max_tokens_per_row, logs)
        assert "auto:" in trainer.rows_description
        assert trainer.room.max_tokens == trainer.planner.max_tokens_per_row
    assert runs["roomy"][0] == row_budget.DEFAULT_TOKENS
    assert runs["tight"][0] < 1024
    assert runs["tight"][1] == pytest.approx(runs["roomy"][1], rel=1e-5)


def test_where_not_even_a_pair_fits_it_says_so_and_tries(tmp_path, monkeypatch, caplog):
    trainer = auto_trainer(tmp_path, monkeypatch, MIB)
    assert "even one pair a row may be too much" in caplog.text
    assert trainer.planner.max_tokens_per_row < 250


def test_without_training_data_the_default_holds(tmp_path, monkeypatch):
    trainer = auto_trainer(tmp_path, monkeypatch, MIB)
    trainer.train_dataset = None
    assert row_budget.planner_of(trainer)[0].max_tokens_per_row == row_budget.DEFAULT_TOKENS


def test_a_sharded_model_needs_a_number(tmp_path, monkeypatch):
    trainer = auto_trainer(tmp_path, monkeypatch, 2**30)
    trainer.equal_rows = True
    with pytest.raises(ConfigError, match="max_tokens_per_row: auto .* sharded; give a number"):
        row_budget.planner_of(trainer)


def test_ranks_on_one_machine_share_its_memory(tmp_path, monkeypatch):
    trainer = auto_trainer(tmp_path, monkeypatch, 60 * MIB)
    alone = trainer.planner.max_tokens_per_row
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    assert row_budget.planner_of(trainer)[0].max_tokens_per_row < alone


def test_a_model_that_cannot_be_counted_needs_a_number(tmp_path):
    model = with_lora(tiny_model())
    model.get_base_model().model.layers[0].extra = torch.nn.Linear(3, 3)
    with pytest.raises(ModelError, match="max_tokens_per_row: auto: .*give a number") as caught:
        trainer_for(model, tmp_path, max_tokens_per_row="auto")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["most", 1, 0, True, float("nan")])
def test_any_other_word_is_refused(value, tmp_path):
    with pytest.raises(ConfigError, match="max_tokens_per_row must be at least 2, or auto"):
        trainer_for(with_lora(tiny_model()), tmp_path, max_tokens_per_row=value)


# ---- what was taken ----

needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@needs_proc
def test_a_peak_is_that_since_the_beginning_and_no_earlier_one():
    device = torch.device("cpu")
    earlier = torch.ones(150 * MIB, dtype=torch.uint8)
    del earlier
    peak = PeakMemory(device)
    assert peak.beyond() < 20 * MIB
    taken = torch.ones(60 * MIB, dtype=torch.uint8)
    del taken
    assert 55 * MIB < peak.beyond() < 90 * MIB
    assert peak.allocated() is None


@needs_proc
def test_free_memory_shrinks_by_what_is_taken():
    before = free_bytes(torch.device("cpu"))
    taken = torch.ones(1024 * MIB, dtype=torch.uint8)
    # Other programs take and give back too, half a gigabyte at a time beside these tests.
    assert 0 < free_bytes(torch.device("cpu")) < before - 100 * MIB
    del taken


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(device_memory, "_CGROUP", tmp_path)
    unlimited = free_bytes(torch.device("cpu"))
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 0.5 * unlimited
    (tmp_path / "memory.max").write_text("1100\n")
    assert free_bytes(torch.device("cpu")) == 1000


def test_a_system_that_says_nothing_of_the_process_fails_no_training(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text("Name: python\n")
    for path in (status, tmp_path / "nowhere"):
        monkeypatch.setattr(device_memory, "_STATUS", path)
        assert PeakMemory(torch.device("cpu")).beyond() is None
        trainer = trainer_for(with_lora(tiny_model()), tmp_path, max_steps=1)
        trainer.train()
        (log,) = [log for log in trainer.state.log_history if "loss" in log]
        assert "lite_orpo/peak_memory_mib" not in log


@needs_proc
def test_the_log_has_the_peak(tmp_path):
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, max_steps=1)
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    assert log["lite_orpo/peak_memory_mib"] > 100


def report(trainer, folder, allocated=None, beyond=None):
    config = RunConfig(
        ModelOptions(model_name_or_path=str(folder)), LoraOptions(lora_r=4), DataOptions(),
        ReportOptions(), trainer.args, {},
    )  # fmt: skip
    out = io.StringIO()
    print_memory(Console(file=out, width=200), config, trainer, allocated, beyond)
    return out.getvalue()


def test_the_report_compares_what_was_measured_with_the_plan(tmp_path):
    model = tiny_model(**SHAPE)
    model.config.save_pretrained(tmp_path)
    trainer = trainer_for(with_lora(model), tmp_path)
    assert report(trainer, tmp_path) == ""
    on_cpu = report(trainer, tmp_path, beyond=50 * MIB)
    assert "Memory: 50 MiB beyond the loaded model at the highest, " in on_cpu
    assert " MiB planned" in on_cpu
    on_gpu = report(trainer, tmp_path, allocated=70 * MIB)
    assert "Memory: 70 MiB on the GPU at the highest, " in on_gpu
    trainer.room.max_tokens = 64
    assert "memory ran out, and rows were cut to 64 tokens" in report(trainer, tmp_path, beyond=1)


@pytest.mark.parametrize("name", ["nowhere", "no/such-model"])
def test_a_report_without_a_plan_says_why(name, tmp_path):
    trainer = trainer_for(with_lora(tiny_model()), tmp_path)
    text = report(trainer, name, beyond=MIB)
    assert "1 MiB beyond the loaded model at the highest; not planned: " in text
