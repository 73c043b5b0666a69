"""The memory that a run will take, item by item, before anything is loaded.

Weights, adapter, gradients and optimiser are counted; what a row holds is traced through the
model's own code on tensors without data (`model/memory_trace.py`); the head and the loss follow
from their sizes. Bytes throughout.

Legend: T tokens of a row, M scored positions, D hidden size.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from ..config.options import LoraOptions, ModelOptions
from ..config.orpo_config import ORPOConfig
from ..data.row_batch import RowBatch
from ..errors import ModelError
from ..model.adapter import base_layer, no_needless_casts
from ..model.head import backbone_of, full_logits_log_probs, innermost_causal_lm, may_be_fused
from ..model.host_memory import OFFLOADING_DEVICES, refuse_embedding_on_host
from ..model.memory_trace import PassMemory, fake_weights, trace_pass
from ..model.meta_twin import MetaTwin, twin_of_options
from ..model.quantization import refuse_contradictions
from ..model.tree_attention import TREE_SDPA, attention_of_trees, register_tree_attention
from ..setup import check_trained_dtypes
from .items import MemoryItem, largest_linear, on_device, training_items, weight_items

# The PyTorch backend takes no more of its workspace on a CPU (lite_orpo_kernels.chunked).
CPU_WORKSPACE = 32 * 2**20
# Their memory is the host's.
_HOST_DEVICES = ("cpu", "mps")


class MemoryPlan(NamedTuple):
    """What a run takes of its device's memory."""

    items: tuple[MemoryItem, ...]
    weights: int
    """Bytes of the base model and its adapter."""
    training: int
    """Bytes that stay from the first step on: gradients, optimiser."""
    step: int
    """Bytes of a step beyond them, at its highest."""

    @property
    def rest(self) -> int:
        """Bytes that stay from step to step."""
        return self.weights + self.training

    @property
    def total(self) -> int:
        """Bytes at the highest moment."""
        return self.rest + self.step


def plan_memory(
    model_options: ModelOptions,
    lora_options: LoraOptions,
    args: ORPOConfig,
    row: RowBatch,
    device: torch.device,
) -> MemoryPlan:
    """Count what a run with these settings takes.

    Args:
        model_options: which base model, and how it is loaded.
        lora_options: the adapter.
        args: training arguments.
        row: the row that takes most, packed or padded (`data.largest_row`).
        device: where the run will be; decides on dtypes, workspace and what can be offloaded.

    Raises:
        ModelError: the options contradict each other, the configuration cannot be read, or the
            model cannot be traced.
    """
    return plan_of_twin(twin_of_run(model_options, lora_options, args, device), args, row, device)


def twin_of_run(
    model_options: ModelOptions, lora_options: LoraOptions, args: ORPOConfig, device: torch.device
) -> MetaTwin:
    """The model of `plan_memory`, without data.

    Raises:
        ModelError: what the training would refuse too.
    """
    refuse_contradictions(model_options, trains_all_weights=not lora_options.use_peft)
    twin = twin_of_options(model_options, lora_options, device, checkpointing=args.is_checkpointing)
    check_trained_dtypes(twin.model)
    return twin


def plan_of_twin(
    twin: MetaTwin,
    args: ORPOConfig,
    row: RowBatch,
    device: torch.device,
    *,
    is_fused: bool | None = None,
) -> MemoryPlan:
    """Count what a run takes that trains the model that this is a twin of.

    Args:
        twin: the model without data.
        args: training arguments.
        row: the row that takes most.
        device: as in `plan_memory`.
        is_fused: whether the head is; None: as its parts suggest.

    Raises:
        ModelError: the model cannot be traced, or cannot be as the arguments ask.
    """
    model = twin.model
    if args.offload_embedding:
        refuse_embedding_on_host(model)
    if is_fused is None:
        is_fused = may_be_fused(model)
    weights = tuple(weight_items(twin, embedding_on_host=_offloads_embedding(args, device)))
    training = tuple(training_items(model, args))
    offloads = args.activation_offloading and device.type in OFFLOADING_DEVICES
    trunk = _trace(model, args, row, offloads=offloads)
    unpacked = largest_linear(twin) if twin.linears.bits is not None else 0
    if is_fused and args.loss_backend != "reference":
        head, note = _fused_head(twin, args, row, device)
        step = max(trunk.kept + head, trunk.peak + unpacked)
    else:
        whole = _trace(model, args, row, offloads=offloads, through_the_head=True)
        head, note = max(whole.peak - trunk.kept, 0), "full logits"
        step = max(whole.peak, trunk.peak + unpacked)
    tokens = int(row.inputs["input_ids"].numel())
    kept = f"{tokens:,} tokens, checkpointing {'on' if args.is_checkpointing else 'off'}"
    items = (
        *weights,
        *training,
        MemoryItem("kept for the backward pass", trunk.kept, kept),
        MemoryItem("moved to the host", trunk.on_host, "", is_on_host=True),
        MemoryItem("work of the largest layer", max(trunk.peak - trunk.kept, 0) + unpacked),
        MemoryItem("head and loss", head, note),
    )
    shown = tuple(item for item in items if item.size or not item.is_on_host)
    return MemoryPlan(shown, on_device(weights), on_device(training), step)


def row_tokens_that_fit(
    plan_for: Callable[[int], MemoryPlan], fits: Callable[[MemoryPlan], bool], most: int, least: int
) -> tuple[int, MemoryPlan]:
    """Choose `max_tokens_per_row`: the most of `most`, half of it, a quarter ..., that fits.

    Args:
        plan_for: the plan with so many tokens in a row.
        fits: whether there is room for it.
        most: to begin with.
        least: where halving ends, because a single pair takes as much.

    Returns:
        The tokens and their plan; where nothing fits, those of the least.
    """
    tokens = most
    while True:
        plan = plan_for(tokens)
        if fits(plan) or tokens <= least:
            return tokens, plan
        tokens = max(tokens // 2, least)


def _offloads_embedding(args: ORPOConfig, device: torch.device) -> bool:
    return args.offload_embedding and device.type not in _HOST_DEVICES


def _fused_head(
    twin: MetaTwin, args: ORPOConfig, row: RowBatch, device: torch.device
) -> tuple[int, str]:
    weight = base_layer(innermost_causal_lm(twin.model).get_output_embeddings()).weight
    workspace = args.loss_workspace_mib * 2**20
    if device.type == "cpu":
        workspace = min(workspace, CPU_WORKSPACE)
    half = 2 if args.bf16 or args.fp16 else twin.dtype.itemsize
    # Rows that are scored, their gradient, and its direction before it is scaled.
    size = workspace + 3 * int(row.score_index.numel()) * weight.shape[1] * half
    if weight.dtype.itemsize != half:
        size += weight.numel() * half  # what autocast makes of it
    if any(p.requires_grad for p in _head_parameters(twin.model)):
        size += weight.numel() * weight.element_size()  # a row's gradient, before it is added
    return size, f"workspace {workspace // 2**20} MiB"


def _head_parameters(model: Any) -> Iterator[torch.Tensor]:
    for name, parameter in innermost_causal_lm(model).get_output_embeddings().named_parameters():
        if "lora_" not in name:
            yield parameter


def _trace(
    model: Any, args: ORPOConfig, row: RowBatch, *, offloads: bool, through_the_head: bool = False
) -> PassMemory:
    causal_lm = innermost_causal_lm(model)
    inputs = dict(row.inputs)
    if not through_the_head:
        inputs.pop("attention_mask", None)  # padding is on the right: causal attention is enough
    is_tree = "tree_spans" in inputs
    register_tree_attention()
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    autocast = torch.autocast("cpu", dtype=half) if half is not None else nullcontext()
    with fake_weights(model), autocast:
        tensors = {
            name: torch.zeros(value.shape, dtype=value.dtype)
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor)
        }
        inputs.update(tensors)
        scored_rows = torch.zeros(row.score_index.shape, dtype=torch.int64)

        def run() -> torch.Tensor:
            if through_the_head:
                return full_logits_log_probs(
                    causal_lm, (scored_rows, scored_rows.clone()), (), inputs
                )
            output = backbone_of(causal_lm)(**inputs, use_cache=False)
            hidden: torch.Tensor = output.last_hidden_state
            return hidden

        trained = [p for p in model.parameters() if p.requires_grad]
        attending = attention_of_trees(causal_lm, TREE_SDPA) if is_tree else nullcontext()
        with attending, no_needless_casts(model, is_autocast=half is not None):
            try:
                return trace_pass(run, trained, offloads=offloads)
            except Exception as error:  # noqa: BLE001 (whatever the architecture's code raises)
                first_line = (str(error) or type(error).__name__).splitlines()[0]
                raise ModelError(
                    f"{type(causal_lm).__name__}: its memory cannot be traced ({first_line})"
                ) from error
