"""The memory that a run will take, item by item, before anything is loaded.

Weights, adapter, gradients and optimiser are counted; what a row holds is traced through the
model's own code on tensors without data (`model/memory_trace.py`); the head and the loss follow
from their sizes. Bytes throughout.

Legend: T tokens of a row, M scored positions, D hidden size.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn

from .config.options import LoraOptions, ModelOptions
from .config.orpo_config import ORPOConfig
from .data.row_batch import RowBatch
from .errors import ModelError
from .model.adapter import lora_config, wrap_with_adapter
from .model.head import backbone_of, innermost_causal_lm
from .model.load import load_config, weight_dtype
from .model.memory_trace import TrunkMemory, fake_weights, trace_trunk
from .model.prefix_sharing import static_refusal
from .model.quantization import refuse_contradictions
from .model.tree_attention import TREE_SDPA, attention_of_trees, register_tree_attention

# The PyTorch backend takes no more of its workspace on a CPU (lite_orpo_kernels.chunked).
CPU_WORKSPACE = 32 * 2**20
# bitsandbytes: one scale for 64 weights; nested, a byte each and an fp32 one for 256 of them.
_NF4_BLOCK, _NESTED_BLOCK = 64, 256
_OPTIMIZER_BYTES = {"adamw": 8.0, "adam": 8.0, "sgd": 0.0, "lion": 4.0, "adafactor": 0.1}


class MemoryItem(NamedTuple):
    """One line of the plan."""

    name: str
    size: int
    note: str = ""


class MemoryPlan(NamedTuple):
    """What a run takes."""

    items: tuple[MemoryItem, ...]
    rest: int
    """Bytes that stay: weights, adapter, gradients, optimiser."""
    step: int
    """Bytes of a step beyond them, at its highest."""

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
        row: the row that takes most, packed or padded.
        device: where the run will be; decides on dtypes and autocast alone.

    Raises:
        ModelError: the configuration cannot be read, or the model cannot be traced.
    """
    refuse_contradictions(model_options, trains_all_weights=not lora_options.use_peft)
    model, dtype = _meta_model(model_options, lora_options, args, device)
    weights = _weights(model, model_options)
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter = 0 if not lora_options.use_peft else _bytes_of(trained)
    gradients = _bytes_of(trained)
    optimizer = int(_optimizer_bytes(args) * sum(p.numel() for p in trained))
    trunk = _trace(model, args, row, dtype)
    width = innermost_causal_lm(model).get_output_embeddings().weight.shape[1]
    scored = int(row.score_index.numel())
    # Rows that are scored, their gradient, and its direction before it is scaled.
    workspace = args.loss_workspace_mib * 2**20
    if device.type == "cpu":
        workspace = min(workspace, CPU_WORKSPACE)
    head = workspace + 3 * scored * width * _hidden_size(args, dtype)
    unpacked = _largest_linear(model, dtype) if _is_quantized(model_options) else 0
    step = max(trunk.kept + head, trunk.peak + unpacked)
    tokens = int(row.inputs["input_ids"].numel())
    items = (
        *weights,
        MemoryItem("adapter", adapter, "fp32" if adapter else ""),
        MemoryItem("gradients", gradients),
        MemoryItem("optimiser", optimizer, _optim_name(args)),
        MemoryItem(
            "kept for the backward pass",
            trunk.kept,
            f"{tokens:,} tokens, checkpointing {'on' if args.is_checkpointing else 'off'}",
        ),
        MemoryItem("work of the largest layer", max(trunk.peak - trunk.kept, 0) + unpacked),
        MemoryItem("head and loss", head, f"workspace {workspace // 2**20} MiB"),
    )
    rest = sum(item.size for item in weights) + adapter + gradients + optimizer
    return MemoryPlan(items, rest, step)


def may_share_prefixes(
    model_options: ModelOptions, lora_options: LoraOptions, args: ORPOConfig
) -> bool:
    """Whether packed rows are to be expected: the static rule alone, no probe."""
    if args.prefix_sharing == "off" or args.torch_compile:
        return False
    model, _ = _meta_model(model_options, lora_options, args, torch.device("cpu"))
    return static_refusal(model, args.max_length) is None


def _meta_model(
    options: ModelOptions, lora: LoraOptions, args: ORPOConfig, device: torch.device
) -> tuple[Any, torch.dtype]:
    from transformers import AutoModelForCausalLM

    dtype = weight_dtype(options.dtype, device, trains_all_weights=not lora.use_peft)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(load_config(options), dtype=dtype)
        adapter = lora_config(lora)
        if adapter is not None:
            model = wrap_with_adapter(model, adapter)
    if args.is_checkpointing:
        causal_lm = innermost_causal_lm(model)
        causal_lm.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        causal_lm.enable_input_require_grads()
    return model.train(), dtype


def _trace(model: Any, args: ORPOConfig, row: RowBatch, dtype: torch.dtype) -> TrunkMemory:
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

        with attention_of_trees(causal_lm, TREE_SDPA) if is_tree else nullcontext():
            try:
                return trace_trunk(run)
            except Exception as error:  # noqa: BLE001 (whatever the architecture's code raises)
                first_line = (str(error) or type(error).__name__).splitlines()[0]
                raise ModelError(
                    f"{type(causal_lm).__name__}: its memory cannot be traced ({first_line})"
                ) from error


def _weights(model: Any, options: ModelOptions) -> tuple[MemoryItem, ...]:
    causal_lm = innermost_causal_lm(model)
    embedding = causal_lm.get_input_embeddings().weight
    head = causal_lm.get_output_embeddings().weight
    linears = _quantizable(causal_lm)
    others: list[torch.Tensor] = [
        p
        for name, p in causal_lm.named_parameters()
        if "lora_" not in name and not any(p is x for x in (embedding, head, *linears))
    ]
    count = sum(p.numel() for p in linears)
    if options.load_in_4bit:
        scales = count // _NF4_BLOCK
        nested = scales + 4 * (scales // _NESTED_BLOCK)
        size, note = count // 2 + (nested if options.use_bnb_nested_quant else 4 * scales), "4 bits"
    elif options.load_in_8bit:
        size, note = count, "8 bits"
    else:
        size, note = _bytes_of(linears), str(embedding.dtype).removeprefix("torch.")
    items = [
        MemoryItem("linear layers", size, note),
        MemoryItem("embedding", _bytes_of([embedding])),
    ]
    if head is not embedding:
        items.append(MemoryItem("output head", _bytes_of([head])))
    items.append(MemoryItem("other weights", _bytes_of(others)))
    return tuple(items)


def _quantizable(causal_lm: Any) -> list[torch.Tensor]:
    head = causal_lm.get_output_embeddings()
    inside_head = set(head.modules())
    return [
        module.weight
        for name, module in causal_lm.named_modules()
        if isinstance(module, nn.Linear) and module not in inside_head and "lora_" not in name
    ]


def _largest_linear(model: Any, dtype: torch.dtype) -> int:
    weights = _quantizable(innermost_causal_lm(model))
    return max((w.numel() for w in weights), default=0) * dtype.itemsize


def _is_quantized(options: ModelOptions) -> bool:
    return options.load_in_4bit or options.load_in_8bit


def _hidden_size(args: ORPOConfig, dtype: torch.dtype) -> int:
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
