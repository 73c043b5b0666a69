"""Inputs and comparisons that the kernels' tests share."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

# Where the Triton kernels run: compiled on a GPU, else in the interpreter (see conftest.py).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

TRANSFORMS = {
    "plain": {},
    "scale": {"logit_scale": 0.0625 * 3},
    "softcap": {"softcap": 2.5},
    "bias": {"bias": True},
    "all": {"logit_scale": 1.7, "softcap": 2.5, "bias": True},
}


class Case(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    grad_logps: torch.Tensor
    options: dict


def make_case(
    rows, width, vocabulary, transform="plain", dtype=torch.float64, *, trainable=True, device="cpu"
):
    """Peaked logits, targets at both ends of the vocabulary; the same numbers on any device."""
    generator = torch.Generator().manual_seed(1000 * rows + 10 * width + vocabulary)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    options = dict(TRANSFORMS[transform])
    # Logits of standard deviation 3: peaked enough that tokens differ, as a trained model's do.
    hidden = (normal(rows, width) * 3).to(device, dtype).requires_grad_()
    weight = (normal(vocabulary, width) / math.sqrt(width)).to(device, dtype)
    weight.requires_grad_(trainable)
    if options.get("bias"):
        options["bias"] = normal(vocabulary).to(device, dtype).requires_grad_(trainable)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    # The vocabulary's ends are where blocks begin and end.
    targets[0], targets[-1] = 0, vocabulary - 1
    grad_logps = normal(rows).to(device)
    return Case(hidden, weight, targets.to(device), grad_logps, options)


def leaves(case):
    tensors = {"hidden": case.hidden, "weight": case.weight, "bias": case.options.get("bias")}
    return {name: t for name, t in tensors.items() if t is not None and t.requires_grad}


def outcome(function, case, **more):
    """The log-probabilities and every gradient, by name."""
    named = leaves(case)
    logps = function(case.hidden, case.weight, case.targets, **case.options, **more)
    gradients = torch.autograd.grad(logps, list(named.values()), case.grad_logps.to(logps.dtype))
    return {"logps": logps.detach(), **dict(zip(named, gradients, strict=True))}


def as_fp64(case):
    """The same numbers, widened: what the rounding of the inputs costs is nobody's error."""
    options = {
        key: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for key, value in case.options.items()
    }
    return case._replace(
        hidden=case.hidden.detach().double().requires_grad_(),
        weight=case.weight.detach().double().requires_grad_(case.weight.requires_grad),
        options=options,
    )


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def eager(hidden, weight, targets, *, bias=None, logit_scale=1.0, softcap=None):
    """What everyone writes, in the dtype of its inputs."""
    logits = F.linear(hidden, weight, bias) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(dim=-1).gather(1, targets.unsqueeze(1)).squeeze(1)


def relative_error(found, exact):
    # Two exact zeros agree.
    found, exact = found.detach().double(), exact.detach()
    return float((found - exact).norm() / exact.norm().clamp_min(1e-300))


def memorised(margin, vocabulary=64, rows=12, dtype=torch.float32):
    """Rows whose target's logit stands `margin` above the others' largest; W = I, so z = h."""
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    # Multiples of 1/16 below 1: exact in bf16, so that every dtype sees the same margins.
    logits = torch.randint(-15, 1, (rows, vocabulary), generator=generator) / 16
    logits.scatter_(1, targets.unsqueeze(1), float(margin))
    hidden = logits.to(dtype).requires_grad_()
    return hidden, torch.eye(vocabulary, dtype=dtype), targets
