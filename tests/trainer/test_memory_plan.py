"""The memory plan: what it foresees of a step is what the step takes; weights are the true ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import memory_worker
import pytest
import torch
from tiny_models import TOKENIZER, quiet_config, tiny_model, trainer_for, with_lora

from lite_orpo import memory_plan
from lite_orpo.config.options import LoraOptions, ModelOptions
from lite_orpo.data.preparation import LengthRule, prepare_pairs
from lite_orpo.data.sources import dataset_source
from lite_orpo.data.step_plan import RowPlanner
from lite_orpo.errors import ModelError
from lite_orpo.memory_plan import may_share_prefixes, plan_memory

CPU = torch.device("cpu")
MIB = 2**20
WIDE = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
CASES = {
    "llama": ("llama", {**WIDE, "num_hidden_layers": 8}, {}),
    "llama checkpointed": ("llama", WIDE, {"gradient_checkpointing": True}),
    "gemma2": ("gemma2", {**WIDE, "sliding_window": 128}, {}),
    "qwen3 padded": ("qwen3", WIDE, {"prefix_sharing": "off"}),
}


def planned(folder, family, model_settings, settings, **options):
    tiny_model(family, **model_settings).config.save_pretrained(folder)
    args = quiet_config(folder, **settings)
    source = dataset_source("rows", memory_worker.rows(8))
    pairs = list(prepare_pairs(source, TOKENIZER, LengthRule(None, "drop")).dataset)
    shares = args.prefix_sharing != "off"
    planner = RowPlanner(0, args.nll_tokens, args.max_tokens_per_row, shares)
    row = planner.plan(pairs)[0]
    model_options = ModelOptions(model_name_or_path=str(folder), **options)
    return plan_memory(model_options, LoraOptions(lora_r=16), args, row, CPU)


def sizes(plan):
    return {item.name: item.size for item in plan.items}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("case", CASES)
def test_a_steps_memory_is_foreseen_within_15_percent_or_32_mib(case, tmp_path):
    family, model_settings, settings = CASES[case]
    plan = planned(tmp_path, family, model_settings, settings)
    # Freed blocks go back at once, so that the peak is what is held, not how the heap tears.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, memory_worker.__file__, family]
    command += [json.dumps(model_settings), json.dumps(settings), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(done.stdout.splitlines()[-1])["extra"]
    assert abs(plan.step / MIB - measured) <= max(0.15 * measured, 32), (plan, measured)


def test_weights_adapter_and_gradients_are_those_of_the_trainers_model(tmp_path):
    plan = planned(tmp_path, "llama", WIDE, {})
    model = with_lora(tiny_model("llama", **WIDE), r=16)
    trained = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() * 4 for p in model.parameters() if not p.requires_grad)
    found = sizes(plan)
    assert found["adapter"] == found["gradients"] == trained
    assert found["optimiser"] == 2 * trained
    names = ("linear layers", "embedding", "output head", "other weights")
    assert sum(found.get(name, 0) for name in names) == frozen
    assert plan.total == plan.rest + plan.step


def test_4_bit_weights_are_those_that_bitsandbytes_makes(tmp_path):
    pytest.importorskip("bitsandbytes")
    from lite_orpo.model.load import load_model

    model = tiny_model("llama", **WIDE)
    model.save_pretrained(tmp_path)
    for nested in (True, False):
        options = {"load_in_4bit": True, "use_bnb_nested_quant": nested}
        plan = planned(tmp_path, "llama", WIDE, {}, **options)
        loaded = load_model(
            ModelOptions(model_name_or_path=str(tmp_path), **options), CPU,
            trains_all_weights=False,
        )  # fmt: skip
        true = 0
        for module in loaded.modules():
            if type(module).__name__ == "Linear4bit":
                state = module.weight.quant_state
                true += module.weight.numel() + state.absmax.nbytes
                true += state.state2.absmax.nbytes if nested else 0
        # The nested scales of each layer are rounded up to whole blocks.
        assert sizes(plan)["linear layers"] == pytest.approx(true, rel=1e-3)


def test_checkpointing_8_bit_optimisers_and_shorter_rows_take_less(tmp_path):
    base = planned(tmp_path, "llama", WIDE, {})
    checkpointed = planned(tmp_path, "llama", WIDE, {"gradient_checkpointing": True})
    short = planned(tmp_path, "llama", WIDE, {"max_tokens_per_row": 500})
    assert checkpointed.step < 0.5 * base.step
    assert short.step < 0.5 * base.step
    eight = planned(tmp_path, "llama", WIDE, {"optim": "adamw_8bit"})
    assert sizes(eight)["optimiser"] * 4 == sizes(base)["optimiser"]
    sgd = planned(tmp_path, "llama", WIDE, {"optim": "sgd"})
    assert sizes(sgd)["optimiser"] == 0


def test_a_training_after_a_plan_is_not_disturbed(tmp_path):
    """Both use the same kept index tensors of a layout; a trace's have no data."""
    planned(tmp_path, "mistral", {**WIDE, "sliding_window": 16}, {})
    rows = memory_worker.rows(8)
    trainer_for(
        with_lora(tiny_model("mistral", max_position_embeddings=2048)), tmp_path, rows,
        prefix_sharing="on", max_steps=1, per_device_train_batch_size=8,
    ).train()  # fmt: skip


def test_models_that_cannot_share_prefixes_are_planned_with_padded_rows(tmp_path):
    args = quiet_config(tmp_path)
    for name, settings, expected in (
        ("llama", {}, True),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, False),
    ):
        tiny_model(name, **settings).config.save_pretrained(tmp_path)
        options = ModelOptions(model_name_or_path=str(tmp_path))
        assert may_share_prefixes(options, LoraOptions(), args) is expected
    off = quiet_config(tmp_path, prefix_sharing="off")
    assert may_share_prefixes(options, LoraOptions(), off) is False


def test_the_workspace_on_a_cpu_is_the_kernels_own():
    from lite_orpo_kernels.chunked import MOST_BYTES_ON_CPU

    assert memory_plan.CPU_WORKSPACE == MOST_BYTES_ON_CPU


def test_a_model_that_cannot_be_traced_is_refused_in_one_line(tmp_path, monkeypatch):
    def broken(run):
        raise RuntimeError("no such operation\nat some place")

    monkeypatch.setattr(memory_plan, "trace_trunk", broken)
    with pytest.raises(ModelError) as caught:
        planned(tmp_path, "llama", {}, {})
    assert "LlamaForCausalLM: its memory cannot be traced (no such operation)" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_loaded_cannot_be_planned(tmp_path):
    tiny_model("llama").config.save_pretrained(tmp_path)
    options = ModelOptions(model_name_or_path=str(tmp_path), load_in_4bit=True)
    with pytest.raises(ModelError, match="load_in_4bit: .* set use_peft: true"):
        plan_memory(options, LoraOptions(use_peft=False), quiet_config(tmp_path), None, CPU)


# ---- the command ----


@pytest.fixture
def config_file(tmp_path):
    tiny_model("llama", **WIDE).config.save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    pairs = "\n".join(json.dumps(row) for row in memory_worker.rows(40))
    (tmp_path / "pairs.jsonl").write_text(pairs)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path / 'base'}\ndataset_name: {tmp_path / 'pairs.jsonl'}\n"
        f"output_dir: {tmp_path / 'out'}\n"
    )
    return path


def run_plan(*words):
    done = subprocess.run(
        [sys.executable, "-m", "lite_orpo.cli.main", "plan", *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "120"},
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


def test_the_command_prints_a_table_and_whether_it_fits(config_file):
    code, text = run_plan(config_file, "--vram", "24")
    assert code == 0, text
    for name in ("linear layers", "adapter", "gradients", "optimiser", "head and loss"):
        assert name in text
    assert "Fits in 24 GiB" in text
    assert "computed, not measured" in text
    assert not (config_file.parent / "out").exists()


def test_what_does_not_fit_is_answered_with_what_to_change(config_file):
    code, text = run_plan(config_file, "--vram", "0.8", "gradient_checkpointing=false")
    assert code == 0, text
    assert "Does not fit in 0.8 GiB" in text
    advice = text[text.index("least harm first") :]
    assert "gradient_checkpointing: true" in advice
    assert "fits" in advice


def test_a_mistake_is_one_line_and_exit_2(config_file):
    assert run_plan("nope.yaml")[0] == 2
    code, text = run_plan(config_file, "--vram", "-3")
    assert code == 2
    assert "--vram must be a positive number of GiB, found -3" in text


def test_the_worker_is_where_it_is_looked_for():
    assert Path(memory_worker.__file__).is_file()
