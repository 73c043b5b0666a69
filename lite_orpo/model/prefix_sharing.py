"""Whether a model may train on packed rows: a static rule, then a probe on the model itself.

The rule refuses what is known to carry state along a row in other ways than attention. The probe
runs the model as it will train, adapter and quantisation in place, because the ways in which an
architecture goes wrong here are silent and move the loss by a thousandth only.

Legend: M scored positions.
"""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..data.padded_rows import padded_row_batch
from ..data.row_batch import PlannedPair, RowBatch
from ..data.tree_rows import tree_row_batch
from . import tree_attention
from .head import innermost_causal_lm
from .tree_attention import ATTENTION_NAMES, attention_of_trees, register_tree_attention

logger = logging.getLogger(__name__)

_KNOWN_LAYERS = {"full_attention", "sliding_attention", "attention"}
_CARRIES_STATE = re.compile(
    r"Mamba|DeltaNet|Rwkv|RWKV|Recurrent|ShortConv|SSM|Retention|Griffin|LinearAttention"
    r"|LightningAttention|Indexer|Compress"
)
# Two orders of summation differ by noise; four times the noise of another such pair is agreement.
_NOISE_FACTOR = 4.0
_PROBE_LENGTHS = ((9, 7, 8), (5, 6, 10))  # prompt, chosen, rejected


class PrefixSharing(NamedTuple):
    """The decision for one model."""

    is_on: bool
    reason: str
    """Why, in words that end a sentence."""
    attention: str = ""
    """Name of the registered attention function, where sharing is on."""

    @contextmanager
    def attending(self, model: Any) -> Iterator[None]:
        """The context in which forward and backward passes over packed rows run."""
        if not self.is_on:
            yield
            return
        with attention_of_trees(innermost_causal_lm(model), self.attention):
            yield


def decide_prefix_sharing(
    model: Any, *, attention: str, max_length: int | None, is_compiled: bool
) -> PrefixSharing:
    """Find out whether a model computes the same on packed rows as on separate sequences.

    Args:
        model: the model on its device, adapter in place, scored head attached and verified.
        attention: "sdpa" or "varlen".
        max_length: most tokens of a sequence in training, None if unlimited.
        is_compiled: whether torch.compile will run the model.

    Returns:
        The decision. The model's mode and attention are as before.
    """
    causal_lm = innermost_causal_lm(model)
    reasons = list(_static_reasons(causal_lm, max_length))
    if is_compiled:
        reasons.append("torch.compile would compile anew for every row's layout")
    if attention == "varlen":
        device, dtype = _computes_on(causal_lm)
        refusal = tree_attention.refuse_varlen(device, dtype)
        if refusal is not None:
            reasons.append(f"tree_attention: varlen: {refusal}")
    if reasons:
        return PrefixSharing(False, reasons[0])
    register_tree_attention()
    name = ATTENTION_NAMES[attention]
    was_training = model.training
    model.eval()
    try:
        reason = _probe(model, causal_lm, name)
    finally:
        model.train(was_training)
    if reason is not None:
        return PrefixSharing(False, reason)
    return PrefixSharing(True, "proved exact on this model", name)


def _static_reasons(causal_lm: Any, max_length: int | None) -> Iterator[str]:
    """Why the model is known not to fit, the most telling reason first."""
    config = causal_lm.config.get_text_config()
    unknown = sorted(set(getattr(config, "layer_types", None) or ()) - _KNOWN_LAYERS)
    if unknown:
        yield f"it has layers of type {', '.join(unknown)}"
    mixers = {
        type(module).__name__
        for module in causal_lm.modules()
        if _CARRIES_STATE.search(type(module).__name__) or isinstance(module, nn.Conv1d)
    }
    if mixers:
        yield f"it mixes positions outside attention ({', '.join(sorted(mixers)[:3])})"
    if getattr(config, "alibi", False):
        yield "its position bias (ALiBi) counts tokens of the row"
    if getattr(config, "attention_chunk_size", None):
        yield "it attends in chunks of the row"
    rope = _rope_that_depends_on_length(config, max_length)
    if rope:
        yield f"its {rope} positions depend on the longest sequence beside a pair"
    if getattr(causal_lm, "_is_stateful", False):
        yield "it carries a state along the row"
    if not getattr(causal_lm, "_supports_attention_backend", False):
        yield "its attention cannot be exchanged"
    elif not causal_lm._can_set_attn_implementation():
        yield "its attention cannot be set"


def _rope_that_depends_on_length(config: Any, max_length: int | None) -> str | None:
    """The rope type whose angles change beyond a length that training may reach."""
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer = [value for value in parameters.values() if isinstance(value, dict)]
    for one in by_layer or [parameters]:
        kind = one.get("rope_type", "default")
        if kind not in ("dynamic", "longrope"):
            continue
        limit = (
            one.get("original_max_position_embeddings")
            or getattr(config, "original_max_position_embeddings", None)
            or getattr(config, "max_position_embeddings", None)
        )
        if max_length is None or limit is None or max_length > limit:
            return str(kind)
    return None


# ---- the probe ----


def _probe(model: Any, causal_lm: Any, name: str) -> str | None:
    """Why packed rows are not exact on this model, or None where they are."""
    pairs = _probe_pairs(causal_lm)
    changed = [
        pair._replace(chosen=[_other(token, causal_lm) for token in pair.chosen]) for pair in pairs
    ]
    tree, tree_changed = (tree_row_batch(each, nll_on_prompt=True) for each in (pairs, changed))
    separate = padded_row_batch(pairs, 0, nll_on_prompt=True)
    expected = _log_probs(model, separate)
    calls: list[int | None] = []
    try:
        with attention_of_trees(causal_lm, name), _recording(name, calls):
            packed = _log_probs(model, tree)
            seen = len(calls)
            packed_changed = _log_probs(model, tree_changed)
    except Exception as error:  # noqa: BLE001 (whatever the architecture's code raises)
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return f"it does not run on packed rows ({first_line})"
    layers = int(causal_lm.config.get_text_config().num_hidden_layers)
    if seen != layers:
        return f"{seen} of its {layers} layers attend through the function that knows packed rows"
    if sum(window is not None for window in calls[:seen]) < _windowed_layers(causal_lm):
        return "it does not tell the attention function of its sliding window"
    is_rejected = (tree.completion_ids >= 0) & (tree.completion_ids % 2 == 1)
    is_rejected = is_rejected.to(packed.device)
    if not torch.equal(packed[is_rejected], packed_changed[is_rejected]):
        leak = float((packed - packed_changed)[is_rejected].abs().max())
        return f"its rejected tokens see the chosen ones (log-probabilities move by {leak:.1e})"
    difference = _root_mean_square(packed[_order(tree)] - expected[_order(separate)])
    noise = _noise(model, causal_lm, separate, expected)
    if not difference <= _NOISE_FACTOR * noise:
        return (
            f"its log-probabilities on packed rows differ by {difference:.1e} from those on "
            f"separate ones, where rounding explains {noise:.1e}"
        )
    return None


def _windowed_layers(causal_lm: Any) -> int:
    """Layers that the configuration gives a sliding window (the probe's rows may be shorter)."""
    config = causal_lm.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return sum(kind == "sliding_attention" for kind in layer_types)
    has_window = getattr(config, "sliding_window", None) is not None
    is_used = getattr(config, "use_sliding_window", True)
    return int(config.num_hidden_layers) if has_window and is_used else 0


def _computes_on(causal_lm: Any) -> tuple[torch.device, torch.dtype]:
    weight = causal_lm.get_input_embeddings().weight
    if torch.is_autocast_enabled(weight.device.type):
        return weight.device, torch.get_autocast_dtype(weight.device.type)
    return weight.device, weight.dtype


def _probe_pairs(causal_lm: Any) -> list[PlannedPair]:
    vocabulary = causal_lm.get_input_embeddings().weight.shape[0]
    tokens = iter((7 * number + 3) % vocabulary for number in range(1, 1000))

    def take(count: int) -> list[int]:
        return [next(tokens) for _ in range(count)]

    return [PlannedPair(take(p), take(c), take(r), is_scored=True) for p, c, r in _PROBE_LENGTHS]


def _other(token: int, causal_lm: Any) -> int:
    vocabulary = int(causal_lm.get_input_embeddings().weight.shape[0])
    return (token + vocabulary // 2) % vocabulary


@torch.no_grad()
def _log_probs(model: Any, row: RowBatch) -> Tensor:
    row = row.to(_computes_on(innermost_causal_lm(model))[0])
    result: Tensor = model(**row.inputs, score_rows=(row.score_index, row.targets))
    return result


def _order(row: RowBatch) -> Tensor:
    """Brings scored positions into an order that the layout does not change."""
    # Stable: within a completion, positions stand in sequence in every layout; prompts (-1) stand
    # pair after pair.
    return torch.sort(row.completion_ids, stable=True).indices


def _noise(model: Any, causal_lm: Any, row: RowBatch, expected: Tensor) -> float:
    """What the order of summation alone changes: the model's SDPA against its eager attention."""
    own = causal_lm.config._attn_implementation
    found = 0.0
    for other in ("eager", "sdpa"):
        if other == own:
            continue
        try:
            with attention_of_trees(causal_lm, other):
                again = _log_probs(model, row)
        except Exception:  # noqa: BLE001 (not every model has both)
            continue
        found = max(found, _root_mean_square(again - expected))
    # Where both happen to agree, the rounding of the dtype that it computes in remains.
    eps = torch.finfo(_computes_on(causal_lm)[1]).eps
    return max(found, eps * _root_mean_square(expected) / 2)


def _root_mean_square(values: Tensor) -> float:
    return float(values.float().square().mean().sqrt())


@contextmanager
def _recording(name: str, windows: list[int | None]) -> Iterator[None]:
    """Note the window of every call of our attention function while the probe runs."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[name]

    def recorded(*args: Any, **kwargs: Any) -> Any:
        windows.append(kwargs.get("sliding_window"))
        return own(*args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, recorded)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(name, own)
