"""What the GPU benchmark compares, and why a peer is left out where it is.

The GPU machine may have torch and Triton alone: every peer is imported on its own, and the reason
why one cannot be is printed with the table. How TRL and torch are called is in `baselines.py`.

A method is called exact if it means to sum the whole vocabulary. Everybody's head is called with
(hidden [M, D], weight [V, D], targets [M]) and returns log-probabilities [M]; a whole loss
returns a scalar.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from baselines import PEERS, Head
from torch import Tensor

UNIT = "mm"
# Temporaries of the eager expression for each logit: bf16 logits, fp32 copy, fp32 result and more.
EAGER_BYTES = 10


class Method(NamedTuple):
    """One way to the log-probabilities or to the loss."""

    key: str
    title: str
    head: Head
    is_exact: bool = True
    wants_gradient: bool = True
    bytes_per_logit: int = 0
    """What must be free for it to be tried."""


def _bare_product(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return torch.mm(hidden, weight.t())


BARE_PRODUCT = Method(UNIT, "bare torch.mm(h, W.T)", _bare_product, wants_gradient=False)


class Found(NamedTuple):
    """Methods that can be tried, and why others cannot."""

    methods: list[Method]
    left_out: dict[str, str]


def head_methods() -> Found:
    """Every head, forward and backward; then the forward pass alone."""
    own = [
        BARE_PRODUCT,
        Method("triton", "lite-orpo, Triton", ours("triton")),
        Method("chunked", "lite-orpo, chunked PyTorch", ours("chunked")),
        Method(
            "eager", "eager: linear, log_softmax", PEERS["eager"].head, bytes_per_logit=EAGER_BYTES
        ),
    ]
    peers, left_out = _load(
        {"torch_chunked": _torch, "trl_chunked": _trl, "liger_flce": _liger, "cce": _cce}
    )
    forward_only = [
        method._replace(
            key=f"{method.key}_no_grad", title=f"{method.title}, no_grad", wants_gradient=False
        )
        for method in own
        if method.key in ("triton", "eager")
    ]
    return Found(own + peers + forward_only, left_out)


def ours(backend: str, **options: Any) -> Head:
    """Our head as ORPOTrainer calls it: every row carries a target, so nothing waits."""
    from lite_orpo_kernels import fused_linear_logprobs

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return fused_linear_logprobs(
            hidden, weight, targets, ignore_index=None, backend=backend, **options
        )

    return head


def loss_methods(pairs: int) -> Found:
    """The whole ORPO loss; rows are 2 * pairs completions of one length, the chosen first."""
    own = [
        BARE_PRODUCT,
        Method("triton", "lite-orpo fused_orpo_loss", orpo_loss_of(pairs, "triton")),
        Method(
            "eager",
            "eager head, lite-orpo loss",
            orpo_loss_of(pairs, "reference"),
            bytes_per_logit=EAGER_BYTES,
        ),
    ]
    peers, left_out = _load({"liger_orpo": lambda: _liger_orpo(pairs)})
    return Found(own + peers, left_out)


def orpo_loss_of(pairs: int, backend: str) -> Head:
    """Our whole loss, with the NLL of the chosen completions, as Liger has it."""
    from lite_orpo_kernels import fused_orpo_loss

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        row = torch.arange(len(targets), device=targets.device) // (len(targets) // (2 * pairs))
        completions = torch.where(row < pairs, 2 * row, 2 * (row - pairs) + 1)
        return fused_orpo_loss(
            hidden,
            weight,
            targets,
            completions,
            row < pairs,
            pair_count=pairs,
            alpha=0.1,
            ignore_index=None,
            backend=backend,
        ).loss

    return loss


def _load(loaders: dict[str, Callable[[], list[Method]]]) -> Found:
    found, left_out = [], {}
    for name, load in loaders.items():
        try:
            found += load()
        # Not only ImportError: a peer built for other versions may fail in its own way.
        except Exception as error:
            left_out[name] = one_line(error)
    return Found(found, left_out)


def one_line(error: Exception) -> str:
    """Say what an exception says, short enough for a table."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:150]}"


def _torch() -> list[Method]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    return [Method("torch_chunked", PEERS["torch_chunked"].title, PEERS["torch_chunked"].head)]


def _trl() -> list[Method]:
    importlib.import_module("trl.kernels")
    return [Method("trl_chunked", PEERS["trl_chunked"].title, PEERS["trl_chunked"].head)]


def _liger() -> list[Method]:
    module: Any = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    function = module.LigerFusedLinearCrossEntropyFunction

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return -function.apply(hidden, weight, targets, None, None, -100, 0.0, 0.0, "none")[0]

    return [Method("liger_flce", 'Liger FLCE, "none"', head)]


def _cce() -> list[Method]:
    module: Any = importlib.import_module("cut_cross_entropy.linear_cross_entropy")
    names = {implementation.name.lower() for implementation in module.LinearCrossEntropyImpl}
    # Later versions keep their variants in presets beside the enumeration.
    names |= set(getattr(getattr(module, "CCEPresets", None), "names", ()))

    def head_of(name: str) -> Head:
        def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
            return -module.linear_cross_entropy(
                hidden, weight, targets, reduction="none", impl=name
            )

        return head

    return [
        Method(name, f'CCE "{name}"', head_of(name), is_exact=name == "cce_exact")
        for name in ("cce", "cce_exact")
        if name in names
    ]


def _liger_orpo(pairs: int) -> list[Method]:
    module: Any = importlib.import_module("liger_kernel.chunked_loss")
    liger = module.LigerFusedLinearORPOLoss(compute_nll_loss=True, compiled=True, chunk_size=1)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        by_completion = hidden.view(2 * pairs, -1, hidden.shape[-1])
        wanted = targets.view(2 * pairs, -1)
        return liger(weight, by_completion, wanted, bias=None, nll_target=None)[0]

    return [Method("liger_orpo", "Liger ORPO", loss)]
