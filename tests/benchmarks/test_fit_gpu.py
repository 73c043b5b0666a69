"""The benchmark of large quantised models runs here at a tiny size, and its methods train alike."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import fit_gpu  # noqa: E402
from llama_shapes import quantised_llama, with_adapter  # noqa: E402

pytest.importorskip("bitsandbytes")


def cell(method):
    specification = {
        "shape": "tiny", "tokens": 1024, "method": method, "device": "cpu", "steps": 1,
        "limit": None,
    }  # fmt: skip
    return {**specification, **fit_gpu.work(specification)}


def test_all_methods_train_alike():
    methods = fit_gpu.methods_of("tiny")
    assert methods == [*fit_gpu.ROW_SETTINGS, fit_gpu.FULL_LOGITS, fit_gpu.TRL]
    cells = [cell(method) for method in methods]
    fit_gpu.check_losses(cells)
    for found in cells:
        assert len(fit_gpu._line(found)) == 11
        assert len(found["losses"]) == 3
        assert found["tokens_per_second"] > 0
        assert found["seconds"].keys() == {"trunk", "rest", "optimiser"}
        assert (found["planned"] is not None) == (found["method"] in fit_gpu.ROW_SETTINGS)
    cells[1]["losses"] = [loss * 1.01 for loss in cells[1]["losses"]]
    with pytest.raises(RuntimeError, match="losses differ: embedding on host"):
        fit_gpu.check_losses(cells)


def test_a_method_that_needs_more_than_the_limit_is_a_line_of_the_table(monkeypatch):
    def full(specification):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(fit_gpu, "_steps", full)
    found = cell(fit_gpu.OURS)
    assert found["out_of_memory"] is True
    fit_gpu.check_losses([found])
    assert fit_gpu._line(found)[3] == "out of memory"
    assert len(fit_gpu._line(found)) == 11


def test_tied_heads_have_no_embedding_to_offload_and_trl_is_left_out_where_it_is_missing(
    monkeypatch,
):
    assert fit_gpu.methods_of("3B") == [fit_gpu.OURS, fit_gpu.FULL_LOGITS, fit_gpu.TRL]
    monkeypatch.setattr(fit_gpu.importlib.util, "find_spec", lambda name: None)
    assert fit_gpu.methods_of("8B") == [fit_gpu.OURS, fit_gpu.ON_HOST, fit_gpu.FULL_LOGITS]


def test_layers_are_quantised_one_by_one_and_the_rest_is_bf16():
    model = with_adapter(quantised_llama("tiny", "cpu"))
    base = model.get_base_model()
    kinds = {type(m).__name__ for name, m in base.named_modules() if name.endswith("base_layer")}
    assert kinds == {"Linear4bit"}
    linears = [m for name, m in base.named_modules() if name.endswith("base_layer")]
    assert len(linears) == 2 * 7
    assert all(m.weight.quant_state.nested for m in linears)
    assert {p.dtype for n, p in base.named_parameters() if "layernorm" in n} == {torch.bfloat16}
    assert base.lm_head.weight.dtype == torch.bfloat16
    assert base.get_input_embeddings().weight is not base.lm_head.weight
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {torch.float32}


def test_the_script_says_what_its_options_are():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "fit_gpu.py"), "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "--limit" in done.stdout
