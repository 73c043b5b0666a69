"""The trainer on the Triton kernels, in the interpreter where there is no GPU: same training."""

import pytest
import torch
from tiny_models import tiny_model, trainer_for, with_lora

import lite_orpo_kernels.head_ops as head_ops
import lite_orpo_kernels.orpo_ops as orpo_ops

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning")


def trained(tmp_path, backend, **settings):
    torch.manual_seed(0)
    model = with_lora(tiny_model("gemma2"), target_modules=["q_proj", "down_proj"])
    trainer = trainer_for(
        model,
        tmp_path / backend,
        loss_backend=backend,
        max_steps=2,
        learning_rate=0.01,
        logging_steps=1,
        **settings,
    )
    assert trainer.head.is_fused
    trainer.train()
    return trainer


def test_training_on_the_triton_kernels_is_the_same_training(tmp_path, monkeypatch):
    seen = []

    def watch(module, name):
        operator = getattr(module, name)

        def watched(*arguments):
            seen.append((name, "triton" in arguments))
            return operator(*arguments)

        monkeypatch.setattr(module, name, watched)

    watch(head_ops, "_linear_logprobs")
    watch(orpo_ops, "_orpo_terms")
    ours = trained(tmp_path, "triton")
    assert ("_linear_logprobs", True) in seen and ("_linear_logprobs", False) not in seen
    assert any(name == "_orpo_terms" for name, _ in seen)
    theirs = trained(tmp_path, "chunked")
    logs = [[line for line in t.state.log_history if "loss" in line] for t in (ours, theirs)]
    assert len(logs[0]) == 2
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "grad_norm", "nll_loss", "rewards/margins", "log_odds_chosen"):
            # fp32, and two steps of Adam in between.
            assert one[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5), key
