"""The examples of `lite_orpo_kernels` in loops that are not ours, run as a user runs them."""

import importlib
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = ("loss_in_plain_pytorch", "loss_in_trl", "simpo_in_accelerate", "pairs_for_loops")
TOLERANCE = 1e-5

# Scripts in a folder are no package: they find each other as they do when run.
sys.path.insert(0, str(EXAMPLES))
loss_in_trl, simpo_in_accelerate, pairs_for_loops = map(importlib.import_module, NAMES[1:])


def run(*command: str) -> str:
    """What a script prints; its folder is not this one, as a user's would not be."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(
        [sys.executable, *command],
        cwd=EXAMPLES.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def fall(printed: str, name: str) -> tuple[float, float]:
    found = re.search(rf"^{name}: loss (\S+) -> (\S+) in \d+ steps$", printed, re.MULTILINE)
    assert found, printed
    return float(found[1]), float(found[2])


def demo_model():
    return AutoModelForCausalLM.from_pretrained(EXAMPLES / "demo_model", dtype=torch.float32)


def test_plain_pytorch_learns():
    first, last = fall(run("examples/loss_in_plain_pytorch.py"), "plain PyTorch")
    assert last < first


def test_trl_learns_as_before_and_needs_a_fraction_of_the_memory(tmp_path):
    printed = run("examples/loss_in_trl.py", "--steps", "12", "--output-dir", str(tmp_path))
    before, after = fall(printed, "TRL's own loss"), fall(printed, "TRL, loss swapped")
    assert after[1] < after[0]
    assert after == pytest.approx(before, abs=2e-3)
    claim = r"^(\d+) MiB with TRL's loss, (\d+) MiB swapped, (\S+) times less$"
    found = re.search(claim, printed, re.MULTILINE)
    assert found, printed
    trl, fused, ratio = map(float, found.groups())
    # One logits tensor of this step is some 120 MiB; the workspace of ours is 64 at most.
    assert trl > 300 and fused < 100
    assert ratio == pytest.approx(trl / fused, rel=0.05)


@pytest.fixture(params=[True, False], ids=["LoRA, frozen head", "whole model"])
def both_trainers(request, tmp_path, monkeypatch):
    """TRL's own and the swapped one, on equal weights that LoRA's B = 0 does not hide."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    trainers = []
    for kind in loss_in_trl.TRAINERS:
        trainer = loss_in_trl.make_trainer(kind, demo_model(), str(tmp_path), 1, request.param)
        generator = torch.Generator().manual_seed(0)
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.02 * noise.to(parameter.device)
        trainers.append(trainer)
    return trainers


def step(trainer, batch):
    """Loss, metrics and gradients, after one forward and backward of a trainer."""
    trainer.model.zero_grad()
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model.train(), batch)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), metrics, {n: p.grad.double() for n, p in named if p.requires_grad}


def relative_error(got, expected):
    assert got.keys() == expected.keys()
    squares = sum((got[name] - expected[name]).square().sum() for name in expected)
    return float(squares / sum(part.square().sum() for part in expected.values())) ** 0.5


def test_trl_loss_gradients_and_metrics_are_trls_own(both_trainers):
    (trl, batch), (fused, same_batch) = (
        (trainer, next(iter(trainer.get_train_dataloader()))) for trainer in both_trainers
    )
    assert torch.equal(batch["chosen_input_ids"], same_batch["chosen_input_ids"])
    lengths = batch["chosen_attention_mask"].sum(1)
    assert lengths.min() < lengths.max(), "no padding: the masks are not tried"
    loss, metrics, gradient = step(trl, batch)
    our_loss, our_metrics, our_gradient = step(fused, same_batch)
    assert our_loss == pytest.approx(loss, abs=TOLERANCE)
    assert our_metrics == pytest.approx(metrics, abs=TOLERANCE)
    assert relative_error(our_gradient, gradient) <= TOLERANCE
    evaluated = [t.prediction_step(t.model, batch, False) for t in (trl, fused)]
    assert torch.allclose(evaluated[0][0], evaluated[1][0], atol=TOLERANCE)
    assert torch.allclose(evaluated[0][1], evaluated[1][1], atol=TOLERANCE)
    # Most of what the gradients differ by is the rounding of TRL's own fp32 logits.
    trl.model.double()
    _, _, exact = step(trl, batch)
    assert relative_error(our_gradient, exact) < relative_error(gradient, exact)


def test_trl_never_makes_logits(both_trainers):
    _, fused = both_trainers
    batch = next(iter(fused.get_train_dataloader()))
    calls = []
    head = next(m for n, m in fused.model.named_modules() if n.endswith("lm_head"))
    head.register_forward_hook(lambda *call: calls.append(call))
    fused.compute_loss(fused.model, batch).backward()
    assert not calls
    # Without targets the model is its own again: generation needs its logits.
    assert fused.model(input_ids=batch["chosen_input_ids"]).logits.shape[-1] == 2048
    assert calls


@pytest.mark.parametrize("setting", ["final_logit_softcapping", "logit_scale"])
def test_trl_refuses_a_model_that_changes_its_logits(setting):
    model = demo_model()
    setattr(model.config, setting, 30.0)
    with pytest.raises(ValueError, match=setting):
        loss_in_trl.teach_to_score(model)


def test_simpo_is_the_papers_equation_on_full_logits():
    model = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLES / "demo_model")
    pairs = pairs_for_loops.load_pairs(tokenizer, 3)
    batch = simpo_in_accelerate.collate_completions(pairs)
    loss = simpo_in_accelerate.SimPO(model, beta=2.5, gamma=1.4)(**batch)
    loss.backward()
    gradient = model.get_input_embeddings().weight.grad.double()

    model = demo_model().double()
    means = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            ids, prompt = torch.tensor(pair[side]), len(pair["prompt"])
            logps = model(input_ids=ids[None]).logits[0].log_softmax(-1)
            means.append(logps[prompt - 1 : -1].gather(1, ids[prompt:, None]).mean())
    margin = 2.5 * torch.stack(means[:3]) - 2.5 * torch.stack(means[3:]) - 1.4
    expected = -torch.log(torch.sigmoid(margin)).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected_gradient = model.get_input_embeddings().weight.grad
    assert (gradient - expected_gradient).norm() <= 1e-4 * expected_gradient.norm()


def test_simpo_learns_in_one_process(capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(sys, "argv", ["simpo_in_accelerate.py", "--steps", "12"])
    simpo_in_accelerate.main()
    printed = capsys.readouterr().out
    first, last = fall(printed, "SimPO in accelerate")
    assert last < first
    assert "weights equal on all 1 processes: True" in printed


def test_simpo_learns_in_two_processes_that_stay_equal():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", port]
    printed = run(*launch, "examples/simpo_in_accelerate.py", "--steps", "10")
    first, last = fall(printed, "SimPO in accelerate")
    assert last < first
    assert "weights equal on all 2 processes: True" in printed


@pytest.mark.parametrize("name", NAMES)
def test_each_example_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 150
