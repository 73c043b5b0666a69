"""Inputs of the GPU benchmark, and what is exact for them: a flat softmax would flatter any head.

Either activations of a real model, from a file, or synthetic ones that the output calls so:
margin * W[target] + noise, with head_cpu's margins, so that tokens range from unlikely to
memorised. A filtered method drops what has no mass: its time and its error mean something only
beside the distribution of p(target), which is described here too.

The file is a `torch.save`d dictionary: "hidden" [N, D], "weight" [V, D], "targets" [N] int64 (row t
predicts targets[t]), and "label", a line that says which model and which texts.

Legend: M scored rows, R rows that are looked at, D hidden size, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from head_cpu import LEAST_MARGIN, MOST_MARGIN, NOISE
from torch import Tensor

LOOKED_AT = 512
BLOCK = 8192
# Upper ends of the classes of 1 - p(target); what is above the last is nearly impossible.
MISS_BOUNDS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 0.9, 0.999)


class Activations(NamedTuple):
    """What a head meets. Nothing here asks for a gradient."""

    hidden: Tensor  # [M, D]
    weight: Tensor  # [V, D]
    targets: Tensor  # [M]
    label: str

    def first(self, rows: int) -> "Activations":
        """The first `rows` rows under the same head."""
        return self._replace(hidden=self.hidden[:rows], targets=self.targets[:rows])


class Exact(NamedTuple):
    """The truth, for rows spread over all of them."""

    rows: Tensor  # [R] indices
    output: Tensor  # [R] log-probabilities, or a scalar loss
    gradient: Tensor  # [R, D]
    miss: Tensor | None = None  # [R], 1 - p(target)


def synthetic(rows: int, width: int, vocabulary: int, device: torch.device) -> Activations:
    """Make peaked bf16 activations under a random head whose rows have a norm of about 1."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, device=device)
    for block in weight.split(BLOCK):
        block.copy_(normal(*block.shape) * width**-0.5)
    targets = torch.randint(vocabulary, (rows,), generator=generator, device=device)
    margins = torch.rand(rows, 1, generator=generator, device=device)
    margins = LEAST_MARGIN + (MOST_MARGIN - LEAST_MARGIN) * margins
    hidden = margins * weight[targets].float() + NOISE * normal(rows, width)
    label = (
        f"SYNTHETIC: margin * W[target] + noise, margins {LEAST_MARGIN:g} to {MOST_MARGIN:g} nats, "
        f"noise {NOISE:g} nats, random W"
    )
    return Activations(hidden.to(torch.bfloat16), weight, targets, label)


def from_file(path: Path, device: torch.device) -> Activations:
    """Read activations of a real model, as bf16.

    Raises:
        ValueError: the file holds something else.
    """
    found = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(found, dict) or not {"hidden", "weight", "targets", "label"} <= set(found):
        raise ValueError(
            f'{path.name} must hold a dictionary: "hidden", "weight", "targets", "label"'
        )
    hidden, weight = (found[name].to(device, torch.bfloat16) for name in ("hidden", "weight"))
    targets = found["targets"].to(device)
    if (
        hidden.ndim != 2
        or hidden.shape[1:] != weight.shape[1:]
        or targets.shape != hidden.shape[:1]
    ):
        raise ValueError(f"{path.name}: hidden [N, D], weight [V, D] and targets [N] do not fit")
    return Activations(hidden, weight, targets, f"REAL MODEL: {found['label']}")


def exact_logprobs(inputs: Activations) -> Exact:
    """Log-probabilities of some rows and their gradient with respect to hidden, in fp64.

    In two passes over blocks of the vocabulary, as q * (W[y] - mean of the rest's rows): that
    form keeps its digits where p(target) is close to 1.
    """
    count = inputs.hidden.shape[0]
    looked_at = min(LOOKED_AT, count)
    index = torch.linspace(0, count - 1, looked_at, dtype=torch.float64).round().long()
    index = index.to(inputs.hidden.device)
    rows, targets = inputs.hidden[index].double(), inputs.targets[index]
    rest = torch.full((looked_at,), float("-inf"), dtype=torch.float64, device=rows.device)
    for logits, _ in _blocks_without_target(rows, inputs.weight, targets):
        rest = torch.logaddexp(rest, torch.logsumexp(logits, dim=1))
    mean_row = torch.zeros_like(rows)
    for logits, block in _blocks_without_target(rows, inputs.weight, targets):
        mean_row += (logits - rest.unsqueeze(1)).exp_() @ block
    own = inputs.weight[targets].double()
    against = rest - (rows * own).sum(dim=1)
    miss = torch.sigmoid(against)
    # threshold: past torch's default of 20 softplus would drop log1p(exp(-d)).
    logps = -torch.nn.functional.softplus(against, threshold=60.0)
    return Exact(index, logps, miss.unsqueeze(1) * (own - mean_row), miss)


def _blocks_without_target(
    rows: Tensor, weight: Tensor, targets: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    start = 0
    for part in weight.split(BLOCK):
        block = part.double()
        columns = torch.arange(start, start + len(part), device=rows.device)
        logits = rows @ block.t()
        yield logits.masked_fill_(columns == targets.unsqueeze(1), float("-inf")), block
        start += len(part)


def errors(exact: Exact, output: Tensor, gradient: Tensor | None) -> dict[str, float]:
    """Relative errors: of the outputs and, if there is one, of the gradient [M, D]."""
    seen = output[exact.rows] if output.ndim else output
    found = {"output": float((seen.double() - exact.output).norm() / exact.output.norm())}
    if gradient is not None:
        difference = (gradient[exact.rows].double() - exact.gradient).norm(dim=1)
        norms = exact.gradient.norm(dim=1)
        found["gradient"] = float(difference.norm() / norms.norm())
        # A row that is exactly zero has no relative error; others may not hide behind it.
        found["worst_row"] = float((difference / norms)[norms > 0].max())
    return found


def describe(miss: Tensor) -> dict[str, Any]:
    """How sure the head is of its targets: deciles of 1 - p, and the share of rows per class."""
    levels = torch.linspace(0, 1, 11, dtype=torch.float64, device=miss.device)
    bounds = torch.tensor(MISS_BOUNDS, dtype=torch.float64, device=miss.device)
    counts = torch.bincount(torch.bucketize(miss, bounds), minlength=len(MISS_BOUNDS) + 1)
    names = [f"<={bound:g}" for bound in MISS_BOUNDS] + [f">{MISS_BOUNDS[-1]:g}"]
    return {
        "rows": len(miss),
        "deciles_of_one_minus_p": torch.quantile(miss, levels).tolist(),
        "share_by_one_minus_p": dict(zip(names, (counts / len(miss)).tolist(), strict=True)),
    }


def described(found: dict[str, Any]) -> str:
    """Two lines for the head of a table."""
    deciles = " ".join(f"{value:.1e}" for value in found["deciles_of_one_minus_p"])
    shares = ", ".join(
        f"{name} {share:.0%}" for name, share in found["share_by_one_minus_p"].items() if share
    )
    return f"1 - p(target), {found['rows']} rows: {shares}\ndeciles of 1 - p: {deciles}"
