"""The head seam: a CausalLM that returns log-probabilities of chosen rows instead of logits.

`attach_scored_head` gives the innermost CausalLM's forward one more argument, `score_rows`.
With it, the model runs its backbone, takes those rows, and computes the log-probabilities inside
the wrapped forward, where DDP, FSDP, autocast and PEFT see it; only fp32 [M] leaves. Without it,
the forward is the model's own.

What stands between the head's product and the logits (scale, soft-cap) is not guessed from a
list of architectures: it is read from the configuration and then proved on the model itself, by
feeding its own head rows that we choose. A model that does not pass keeps its own full logits,
with a warning.

Legend: M scored rows, D hidden size, V vocabulary.
"""

import functools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lite_orpo_kernels import fused_linear_logprobs, logprobs_from_logits, select_backend

from ..errors import ModelError
from .head_parts import HeadParts, parts_of_head

logger = logging.getLogger(__name__)

# The probe's logits span about this range: far enough for any soft-cap in use to show.
PROBE_LOGIT_RANGE = 50.0


class HeadTransform(NamedTuple):
    """What the model does to the head's product: scale, then soft-cap."""

    logit_scale: float
    softcap: float | None

    def apply(self, logits: Tensor) -> Tensor:
        """Transform full logits, for the comparison with the model's own."""
        logits = logits * self.logit_scale
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)


class ScoredHead:
    """The state of one attached head: how it computes, and how to take it off again."""

    def __init__(self, causal_lm: Any, backend: str, workspace_bytes: int) -> None:
        self.causal_lm = causal_lm
        self.backend = backend
        self.workspace_bytes = workspace_bytes
        self.transform: HeadTransform | None = None
        """None while the model's own full logits are used."""
        self.reason = "not verified yet"
        """Why full logits are used, where they are."""
        self._own_forward: Callable[..., Any] = causal_lm.forward
        self._forward_is_instance_attribute = "forward" in causal_lm.__dict__

    @property
    def is_fused(self) -> bool:
        """Whether log-probabilities come from the fused op, not from full logits."""
        return self.transform is not None

    def verify(self) -> None:
        """Find the transform and prove it on the model; fall back to full logits if none fits.

        Runs the model on four tokens, without gradients. Call it once the model is on its
        device.
        """
        self.transform, self.reason = _find_transform(self.causal_lm, self._own_forward)
        if self.transform is None:
            logger.warning(
                "the fused head does not fit %s (%s): using the model's own full logits, which "
                "are right but take memory of the size rows x vocabulary",
                type(self.causal_lm).__name__,
                self.reason,
            )

    def log_probs(self, score_rows: tuple[Tensor, Tensor], args: Any, kwargs: Any) -> Tensor:
        """Run the model and score some of its positions.

        Args:
            score_rows: index [M] into the flattened [batch * length] positions, and the target
                token of each [M]; int64.
            args: positional arguments of the model's forward.
            kwargs: its keyword arguments.

        Returns:
            fp32 log-probabilities [M].
        """
        index, targets = score_rows
        if self.transform is None:
            return full_logits_log_probs(self._own_forward, score_rows, args, kwargs)
        output = backbone_of(self.causal_lm)(*args, use_cache=False, **_forbackbone_of(kwargs))
        rows = output.last_hidden_state.flatten(0, 1).index_select(0, index)
        parts = parts_of_head(self.causal_lm.get_output_embeddings())
        if parts is None:
            raise ModelError(
                "the output head is no longer the one the trainer started with (an adapter was "
                "merged or exchanged); make a new trainer"
            )
        return fused_linear_logprobs(
            rows,
            parts.linear.weight,
            targets,
            bias=parts.linear.bias,
            low_rank=parts.low_rank(rows),
            logit_scale=self.transform.logit_scale,
            softcap=self.transform.softcap,
            ignore_index=None,  # every chosen position carries a target
            backend=self.backend,
            workspace_bytes=self.workspace_bytes,
        )

    def detach(self) -> None:
        """Give the model its own forward back."""
        if self.causal_lm.__dict__.get("_lite_orpo_head") is self:
            del self.causal_lm._lite_orpo_head
            del self.causal_lm.forward
            if self._forward_is_instance_attribute:
                self.causal_lm.forward = self._own_forward


def attach_scored_head(
    model: Any, *, backend: str, workspace_bytes: int, device: torch.device | str
) -> ScoredHead:
    """Teach the innermost CausalLM of `model` the argument `score_rows`.

    Args:
        model: a transformers CausalLM, maybe wrapped by PEFT.
        backend: backend of `fused_linear_logprobs`.
        workspace_bytes: its workspace.
        device: where the model will be when it runs.

    Returns:
        The attached head; call `verify()` when the model is on its device.

    Raises:
        ModelError: the backend is unknown, or cannot run on the device.
    """
    try:
        select_backend(device, backend)
    except (ValueError, ModuleNotFoundError) as error:
        raise ModelError(f"loss_backend: {error}") from None
    causal_lm = innermost_causal_lm(model)
    previous = causal_lm.__dict__.get("_lite_orpo_head")
    if previous is not None:
        previous.detach()
    head = ScoredHead(causal_lm, backend, workspace_bytes)

    # The head is looked up on `self`, not closed over: a deep copy of the model must run its own
    # weights. Wraps the plain function, so that the signature keeps its first argument.
    @functools.wraps(getattr(causal_lm.forward, "__func__", causal_lm.forward))
    def forward(
        self: Any, *args: Any, score_rows: tuple[Tensor, Tensor] | None = None, **kwargs: Any
    ) -> Any:
        attached: ScoredHead = self._lite_orpo_head
        if score_rows is None:
            return attached._own_forward(*args, **kwargs)
        return attached.log_probs(score_rows, args, kwargs)

    causal_lm.forward = types.MethodType(forward, causal_lm)
    object.__setattr__(causal_lm, "_lite_orpo_head", head)
    return head


def full_logits_log_probs(
    forward: Callable[..., Any], score_rows: tuple[Tensor, Tensor], args: Any, kwargs: Any
) -> Tensor:
    """The log-probabilities [M] of `ScoredHead.log_probs`, from a model's own full logits."""
    index, targets = score_rows
    logits = forward(*args, use_cache=False, **kwargs).logits
    return logprobs_from_logits(logits.flatten(0, 1).index_select(0, index), targets)


def may_be_fused(model: Any) -> bool:
    """Whether the head's parts are known; a transform that is not may still be in the way."""
    causal_lm = innermost_causal_lm(model)
    head = causal_lm.get_output_embeddings()
    return parts_of_head(head) is not None and backbone_of(causal_lm) is not causal_lm


def innermost_causal_lm(model: Any) -> Any:
    """The transformers CausalLM inside a PEFT wrapper, or the model itself."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def backbone_of(causal_lm: Any) -> Any:
    """The model without its head; the model itself where that is not known."""
    return getattr(causal_lm, str(getattr(causal_lm, "base_model_prefix", "")), causal_lm)


def _forbackbone_of(kwargs: dict[str, Any]) -> dict[str, Any]:
    # PEFT passes these to every CausalLM; a backbone does not know them.
    return {k: v for k, v in kwargs.items() if k not in ("labels", "logits_to_keep", "return_dict")}


def _candidates(config: Any) -> Iterator[HeadTransform]:
    """Transforms that a configuration may mean, the likeliest first."""
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    softcap = getattr(text_config, "final_logit_softcapping", None)
    scales = [1.0]
    for name in ("logit_scale", "lm_head_multiplier"):
        if getattr(text_config, name, None) is not None:
            scales.insert(0, float(getattr(text_config, name)))
    scaling = getattr(text_config, "logits_scaling", None)
    if scaling:
        # Granite divides by it, HyperCLOVA X multiplies.
        scales[:0] = [1.0 / float(scaling), float(scaling)]
    for scale in scales:
        yield HeadTransform(scale, softcap)
        if softcap is not None:
            yield HeadTransform(scale, None)


class _Probe(NamedTuple):
    head_input: Tensor  # what the model feeds its head
    hidden: Tensor  # what its backbone returns
    rows: Tensor  # what we fed the head instead
    logits: Tensor  # what came out at the model's end


@torch.no_grad()
def _find_transform(
    causal_lm: Any, own_forward: Callable[..., Any]
) -> tuple[HeadTransform | None, str]:
    get_head = getattr(causal_lm, "get_output_embeddings", None)
    parts = parts_of_head(get_head()) if callable(get_head) else None
    if parts is None:
        return None, "its output head is no plain linear layer, nor one with a plain LoRA"
    if backbone_of(causal_lm) is causal_lm:
        return None, "its backbone is not known"
    was_training = causal_lm.training
    causal_lm.eval()
    try:
        probe = _probe(causal_lm, own_forward, parts)
    finally:
        causal_lm.train(was_training)
    if probe is None:
        return None, "its head is not called in its forward pass"
    eps = torch.finfo(parts.linear.weight.dtype).eps
    # Rounding of the dtype, with room for a different order of summation.
    if not _close(probe.head_input, probe.hidden, 16 * eps):
        return None, "its head does not get the backbone's output as it is"
    product = parts.product(probe.rows)
    for transform in _candidates(causal_lm.config):
        # The same product, rounded at most four times: in bf16, 16 eps would excuse a soft-cap
        # of 100 or a scale of 1.05.
        if _close(transform.apply(product), probe.logits.float(), 4 * eps):
            return transform, ""
    return None, "its logits are changed in a way that is not known here"


def _probe(causal_lm: Any, own_forward: Callable[..., Any], parts: HeadParts) -> _Probe | None:
    device = parts.linear.weight.device
    tokens = torch.arange(4, device=device).unsqueeze(0) % parts.linear.weight.shape[0]
    mask = torch.ones_like(tokens)
    seen: dict[str, Tensor] = {}

    def swap_input(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        seen["head_input"] = inputs[0]
        natural = parts.product(inputs[0]).abs().max()
        seen["rows"] = inputs[0] * (PROBE_LOGIT_RANGE / natural.clamp_min(1e-6)).to(inputs[0].dtype)
        return (seen["rows"],)

    handle = causal_lm.get_output_embeddings().register_forward_pre_hook(swap_input)
    try:
        logits = own_forward(input_ids=tokens, attention_mask=mask, use_cache=False).logits
    finally:
        handle.remove()
    if not seen:
        return None
    backbone = backbone_of(causal_lm)
    hidden = backbone(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return _Probe(seen["head_input"], hidden, seen["rows"], logits)


def _close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    if left.shape != right.shape:
        return False
    # The smaller of the two: an infinite logit (a masked token) must not excuse everything.
    scale = torch.minimum(left.float().abs().max(), right.float().abs().max()).clamp_min(1e-6)
    return bool((left.float() - right.float()).abs().max() <= tolerance * scale)
