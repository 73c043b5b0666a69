"""The memory that a run will take, item by item, before anything is loaded.

Weights, adapter, gradients and optimiser are counted; what a row holds is traced through the
model's own code on tensors without data (`model/memory_trace.py`); the head and the loss follow
from their sizes. Bytes throughout.

Legend: T tokens of a row, M scored positions, D hidden size.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from .config.options import LoraOptions, ModelOptions
from .config.orpo_config import ORPOConfig
from .data.row_batch import RowBatch
from .errors import ModelError
from .model.adapter import no_needless_casts
from .model.head import backbone_of, innermost_causal_lm
from .model.host_memory import OFFLOADING_DEVICES, refuse_embedding_on_host
from .model.memory_trace import TrunkMemory, fake_weights, trace_trunk
from .model.meta_twin import MetaTwin, Storage, twin_of_options
from .model.prefix_sharing import static_refusal
from .model.quantization import refuse_contradictions
from .model.tree_attention import TREE_SDPA, attention_of_trees, register_tree_attention

# The PyTorch backend takes no more of its workspace on a CPU (lite_orpo_kernels.chunked).
CPU_WORKSPACE = 32 * 2**20
# bitsandbytes: one scale for 64 weights; nested, a byte each and an fp32 one for 256 of them.
_NF4_BLOCK, _NESTED_BLOCK = 64, 256
# Their memory is the host's.
_HOST_DEVICES = ("cpu", "mps")
_OPTIMIZER_BYTES = {"adamw": 8.0, "adam": 8.0, "sgd": 0.0, "lion": 4.0, "adafactor": 0.1}


class MemoryItem(NamedTuple):
    """One line of the plan."""

    name: str
    size: int
    note: str = ""
    is_on_host: bool = False
    """In the host's memory, where the device is another."""


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
    refuse_contradictions(model_options, trains_all_weights=not lora_options.use_peft)
    twin = twin_of_options(model_options, lora_options, device, checkpointing=args.is_checkpointing)
    return plan_of_twin(twin, args, row, device)


def plan_of_twin(
    twin: MetaTwin, args: ORPOConfig, row: RowBatch, device: torch.device
) -> MemoryPlan:
    """Count what a run takes that trains the model that this is a twin of.

    Args:
        twin: the model without data.
        args: training arguments.
        row: the row that takes most.
        device: as in `plan_memory`.

    Raises:
        ModelError: the model cannot be traced, or cannot be as the arguments ask.
    """
    if args.offload_embedding:
        refuse_embedding_on_host(twin.model)
    offloads = args.activation_offloading and device.type in OFFLOADING_DEVICES
    trunk = _trace(twin.model, args, row, offloads)
    tokens = int(row.inputs["input_ids"].numel())
    holds_embedding = device.type in _HOST_DEVICES or not args.offload_embedding
    trained = [p for p in twin.model.parameters() if p.requires_grad]
    adapter = _bytes_of(trained) if hasattr(twin.model, "peft_config") else 0
    weights = (
        *_weights(twin, embedding_on_host=not holds_embedding),
        MemoryItem("adapter", adapter),
    )
    states = int(_optimizer_bytes(args) * sum(p.numel() for p in trained))
    training = (
        MemoryItem("gradients", _bytes_of(trained)),
        MemoryItem("optimiser", states, _optim_name(args)),
    )
    workspace = args.loss_workspace_mib * 2**20
    if device.type == "cpu":
        workspace = min(workspace, CPU_WORKSPACE)
    width = innermost_causal_lm(twin.model).get_output_embeddings().weight.shape[1]
    # Rows that are scored, their gradient, and its direction before it is scaled.
    head = workspace + 3 * int(row.score_index.numel()) * width * _hidden_bytes(args, twin.dtype)
    unpacked = _largest_linear(twin) if twin.linears.bits is not None else 0
    in_work = max(trunk.peak - trunk.kept, 0) + unpacked
    kept = f"{tokens:,} tokens, checkpointing {'on' if args.is_checkpointing else 'off'}"
    items = (
        *weights,
        *training,
        MemoryItem("kept for the backward pass", trunk.kept, kept),
        MemoryItem("moved to the host", trunk.on_host, "", is_on_host=True),
        MemoryItem("work of the largest layer", in_work),
        MemoryItem("head and loss", head, f"workspace {workspace // 2**20} MiB"),
    )
    return MemoryPlan(
        tuple(item for item in items if item.size or not item.is_on_host),
        _on_device(weights),
        _on_device(training),
        step=max(trunk.kept + head, trunk.peak + unpacked),
    )


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


def may_share_prefixes(
    model_options: ModelOptions, lora_options: LoraOptions, args: ORPOConfig
) -> bool:
    """Whether packed rows are to be expected: the static rule alone, no probe."""
    if args.prefix_sharing == "off" or args.torch_compile:
        return False
    twin = twin_of_options(model_options, lora_options, torch.device("cpu"), checkpointing=False)
    return static_refusal(twin.model, args.max_length) is None


def _on_device(items: Sequence[MemoryItem]) -> int:
    return sum(item.size for item in items if not item.is_on_host)


def _trace(model: Any, args: ORPOConfig, row: RowBatch, offloads: bool) -> TrunkMemory:
    causal_lm = innermost_causal_lm(model)
    inputs = {name: value for name, value in row.inputs.items() if name != "attention_mask"}
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

        def run() -> torch.Tensor:
            output = backbone_of(causal_lm)(**{**inputs, **tensors}, use_cache=False)
            hidden: torch.Tensor = output.last_hidden_state
            return hidden

        attending = attention_of_trees(causal_lm, TREE_SDPA) if is_tree else nullcontext()
        with attending, no_needless_casts(model, is_autocast=half is not None):
            try:
                return trace_trunk(run, offloads=offloads)
            except Exception as error:  # noqa: BLE001 (whatever the architecture's code raises)
                first_line = (str(error) or type(error).__name__).splitlines()[0]
                raise ModelError(
                    f"{type(causal_lm).__name__}: its memory cannot be traced ({first_line})"
                ) from error


def _weights(twin: MetaTwin, *, embedding_on_host: bool) -> Iterator[MemoryItem]:
    causal_lm = innermost_causal_lm(twin.model)
    embedding = causal_lm.get_input_embeddings().weight
    head = causal_lm.get_output_embeddings().weight
    linears = _quantizable(causal_lm)
    others: list[torch.Tensor] = [
        p
        for name, p in causal_lm.named_parameters()
        if "lora_" not in name and not any(p is x for x in (embedding, head, *linears))
    ]
    yield _linear_layers(linears, twin.linears, embedding.dtype)
    where = "on the host" if embedding_on_host else ""
    yield MemoryItem("embedding", _bytes_of([embedding]), where, embedding_on_host)
    if head is not embedding:
        yield MemoryItem("output head", _bytes_of([head]))
    yield MemoryItem("other weights", _bytes_of(others))


def _linear_layers(
    linears: Sequence[torch.Tensor], storage: Storage, dtype: torch.dtype
) -> MemoryItem:
    count = sum(p.numel() for p in linears)
    size, note = _bytes_of(linears), str(dtype).removeprefix("torch.")
    if storage.bits == 8:
        size, note = count, "8 bits"
    elif storage.bits == 4:
        scales = count // _NF4_BLOCK
        nested = scales + 4 * (scales // _NESTED_BLOCK)
        size = count // 2 + (nested if storage.has_nested_scales else 4 * scales)
        note = "4 bits"
    return MemoryItem("linear layers", size, note)


def _quantizable(causal_lm: Any) -> list[torch.Tensor]:
    head = causal_lm.get_output_embeddings()
    inside_head = set(head.modules())
    return [
        module.weight
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and module not in inside_head and "lora_" not in name
    ]


def _largest_linear(twin: MetaTwin) -> int:
    weights = _quantizable(innermost_causal_lm(twin.model))
    return max((w.numel() for w in weights), default=0) * twin.dtype.itemsize


def _hidden_bytes(args: ORPOConfig, dtype: torch.dtype) -> int:
    return 2 if args.bf16 or args.fp16 else dtype.itemsize


def _optim_name(args: ORPOConfig) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _optimizer_bytes(args: ORPOConfig) -> float:
    """Bytes of state for each trained weight."""
    name = _optim_name(args)
    states = next((size for kind, size in _OPTIMIZER_BYTES.items() if kind in name), 8.0)
    return states / 4 if "8bit" in name else states


def _bytes_of(parameters: Sequence[torch.Tensor]) -> int:
    unique = {id(p): p for p in parameters}
    return sum(p.numel() * p.element_size() for p in unique.values())
