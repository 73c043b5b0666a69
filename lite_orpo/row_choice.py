"""Packed rows or separate padded ones: the decision for a run, alike on all ranks, and in words."""

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from .config.orpo_config import ORPOConfig
from .data.row_tokens import RowTokens, count_row_tokens
from .errors import ModelError
from .model.head import innermost_causal_lm
from .model.prefix_sharing import PrefixSharing, decide_prefix_sharing, static_refusal

logger = logging.getLogger(__name__)


def choose_rows(trainer: Any) -> tuple[PrefixSharing, str]:
    """Decide between packed rows and separate padded ones, and say so in one line.

    Args:
        trainer: with its model on the device, its head verified and its data prepared.

    Returns:
        The decision, and it in words with what it saves or costs.

    Raises:
        ModelError: `prefix_sharing` is "on" and the model does not compute the same that way.
    """
    args = trainer.args
    if args.prefix_sharing == "off":
        return PrefixSharing(False, "prefix_sharing is off"), "separate, padded (as configured)"
    sharing = _alike_on_all_ranks(trainer, _decide(trainer))
    if args.prefix_sharing == "on" and not sharing.is_on:
        raise ModelError(
            f"prefix_sharing: on, but {type(innermost_causal_lm(trainer.model)).__name__} cannot: "
            f"{sharing.reason}; set it to auto or off"
        )
    dataset = trainer.train_dataset if trainer.train_dataset is not None else trainer.eval_dataset
    tokens = None
    if dataset is not None and not isinstance(dataset, dict):
        tokens = count_row_tokens(dataset, args.per_device_train_batch_size)
    text = _in_words(sharing, tokens, args.per_device_train_batch_size)
    logger.log(logging.INFO if sharing.is_on else logging.WARNING, "rows: %s", text)
    return sharing, text


def _decide(trainer: Any) -> PrefixSharing:
    args = trainer.args
    # Variable-length attention takes half precision only; the plain probe is sharper in fp32.
    is_autocast = args.tree_attention == "varlen"
    with trainer.compute_loss_context_manager() if is_autocast else nullcontext():
        return decide_prefix_sharing(
            trainer.model,
            attention=args.tree_attention,
            max_length=trainer.length_rule.max_length,
            run_refusals=list(_run_refusals(trainer.args, is_compiled=_is_compiled(trainer))),
        )


def expects_packed_rows(model: Any, args: ORPOConfig, max_length: int | None) -> bool:
    """Whether packed rows are to be expected of a model without data: by rules, without a probe.

    Args:
        model: on any device, its weights are not looked at.
        args: training arguments.
        max_length: the longest sequence.
    """
    if args.prefix_sharing == "off" or any(_run_refusals(args, is_compiled=args.torch_compile)):
        return False
    return static_refusal(model, max_length) is None


def _run_refusals(args: ORPOConfig, *, is_compiled: bool) -> Iterator[str]:
    if is_compiled:
        yield "torch.compile would compile anew for every row's layout"
    if args.neftune_noise_alpha is not None:
        yield "NEFTune's noise goes by the length of the row"


def _is_compiled(trainer: Any) -> bool:
    plugin = getattr(trainer.accelerator.state, "dynamo_plugin", None)
    backend = getattr(getattr(plugin, "backend", None), "value", "NO")
    return (
        trainer.args.torch_compile
        or str(backend).upper() != "NO"
        or hasattr(trainer.model, "_orig_mod")
        or getattr(trainer.model, "_compiled_call_impl", None) is not None
    )


def _alike_on_all_ranks(trainer: Any, own: PrefixSharing) -> PrefixSharing:
    """What all ranks agree on: no, if one of them cannot; of a sharded model, the first one's."""
    if trainer.args.world_size == 1:
        return own
    from accelerate.utils import gather_object

    decisions: list[PrefixSharing] = gather_object([own])
    if trainer.equal_rows:
        # Other ranks may not have their weights yet.
        return decisions[0]
    return next((decision for decision in decisions if not decision.is_on), own)


def _in_words(sharing: PrefixSharing, tokens: RowTokens | None, batch: int) -> str:
    if not sharing.is_on:
        text = f"separate, padded: {sharing.reason}"
        if tokens is not None and tokens.packed:
            text += f"; packed rows would take {tokens.separate / tokens.packed:.2f}x fewer tokens"
        return text
    text = f"packed, each prompt once: {sharing.reason}"
    if tokens is not None and tokens.packed:
        text += (
            f"; {tokens.packed:,} tokens an epoch, {tokens.separate / tokens.packed:.2f}x fewer "
            f"than separate sequences, {tokens.padded / tokens.packed:.2f}x fewer than padded "
            f"batches of {batch}"
        )
    return text
