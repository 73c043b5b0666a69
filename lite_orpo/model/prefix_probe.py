"""Runs a model on packed rows and on separate ones, and says whether it computes the same.

The ways in which an architecture goes wrong here are silent and move the loss by a thousandth
only, less than half precision rounds. So most tests are exact whatever the dtype: which layers
attend, whether they are told their window, whether a gradient is zero, whether a change shows.
Only the last one compares numbers, with the noise of the model's own two attention paths.

Legend: M scored positions.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..allocator_failure import is_out_of_memory
from ..data.padded_rows import padded_row_batch
from ..data.row_batch import PlannedPair, RowBatch
from ..data.tree_rows import tree_row_batch
from .tree_attention import attention_of_trees

# Two orders of summation differ by noise; four times the noise of another such pair is agreement.
_NOISE_FACTOR = 4.0
# Prompt, chosen, rejected. The chosen side is long, so that positions counted along the row would
# be far from those of the sequence.
_LENGTHS = ((7, 23, 8), (4, 18, 11))


def why_not_exact(model: Any, causal_lm: Any, attention: str) -> str | None:
    """Test a model on a few short pairs.

    Args:
        model: in evaluation mode, with its scored head.
        causal_lm: the innermost CausalLM in it.
        attention: name of a registered attention function of ours.

    Returns:
        The reason why packed rows are not exact on it, or None where they are.
    """
    try:
        return _Probe(model, causal_lm, attention).reason()
    except Exception as error:  # noqa: BLE001 (whatever the architecture's code raises)
        if is_out_of_memory(error):
            raise
        first_line = (str(error) or type(error).__name__).splitlines()[0]
        return f"it does not run on packed rows ({first_line})"


def computes_on(causal_lm: Any) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the model's computation, autocast counted in."""
    weight = causal_lm.get_output_embeddings().weight  # the embedding may be on the host
    if torch.is_autocast_enabled(weight.device.type):
        return weight.device, torch.get_autocast_dtype(weight.device.type)
    return weight.device, weight.dtype


class _Probe:
    def __init__(self, model: Any, causal_lm: Any, attention: str) -> None:
        self.model = model
        self.causal_lm = causal_lm
        self.attention = attention
        self.device = computes_on(causal_lm)[0]
        self.vocabulary = min(
            causal_lm.get_input_embeddings().weight.shape[0],
            causal_lm.get_output_embeddings().weight.shape[0],
        )
        pairs = self._pairs()
        self.tree = tree_row_batch(pairs, nll_on_prompt=True).to(self.device)
        self.separate = padded_row_batch(pairs, 0, nll_on_prompt=True).to(self.device)
        ids = self.tree.completion_ids
        self.rejected = (ids >= 0) & (ids % 2 == 1)

    def reason(self) -> str | None:
        windows: list[int | None] = []
        with torch.no_grad():
            expected = self._log_probs(self.separate)
            noise = self._noise(expected)
            with self._packed(), _recording(self.attention, windows):
                packed = self._log_probs(self.tree)
        for reason in (
            self._why_not_every_layer(windows),
            self._why_positions_do_not_matter(packed),
            self._why_it_leaks(packed, noise),
            self._why_it_differs(packed, expected, noise),
        ):
            if reason is not None:
                return reason
        return None

    def _why_not_every_layer(self, windows: list[int | None]) -> str | None:
        layers = int(self.causal_lm.config.get_text_config().num_hidden_layers)
        if len(windows) != layers:
            return (
                f"{len(windows)} of its {layers} layers attend through the function that knows "
                "packed rows"
            )
        # The probe's rows may be shorter than the window, so numbers would not tell.
        if sum(window is not None for window in windows) < _windowed_layers(self.causal_lm):
            return "it does not tell the attention function of its sliding window"
        return None

    @torch.no_grad()
    def _why_positions_do_not_matter(self, packed: Tensor) -> str | None:
        """A model that counts positions along the row does not notice other ones."""
        along_row = torch.arange(self.tree.tokens, device=self.device).unsqueeze(0)
        inputs = {**self.tree.inputs, "position_ids": along_row}
        with self._packed():
            elsewhere = self._log_probs(self.tree._replace(inputs=inputs))
        if torch.equal(elsewhere[self.rejected], packed[self.rejected]):
            return "it does not read position_ids"
        return None

    def _why_it_leaks(self, packed: Tensor, noise: float) -> str | None:
        gradient = self._gradient_at_chosen_tokens()
        if gradient != 0.0:
            return (
                "its rejected tokens see the chosen ones (a gradient between them of "
                f"{gradient:.1e})"
            )
        # What no gradient shows: something that goes by the token ids. Not bitwise, because the
        # experts of a mixture round by how many tokens they get.
        ids = self.tree.inputs["input_ids"].clone()
        for start, end in self._chosen_places():
            ids[0, start:end] = (ids[0, start:end] + self.vocabulary // 2) % self.vocabulary
        with torch.no_grad(), self._packed():
            changed = self._log_probs(
                self.tree._replace(inputs={**self.tree.inputs, "input_ids": ids})
            )
        moved = _root_mean_square(changed[self.rejected] - packed[self.rejected])
        if not moved <= _NOISE_FACTOR * noise:
            return (
                "its rejected tokens see the chosen ones (log-probabilities move by "
                f"{moved:.1e}, where rounding explains {noise:.1e})"
            )
        return None

    def _why_it_differs(self, packed: Tensor, expected: Tensor, noise: float) -> str | None:
        packed, expected = packed[_order(self.tree)], expected[_order(self.separate)]
        is_rejected = self.rejected[_order(self.tree)]
        for part in (is_rejected, ~is_rejected):
            difference = _root_mean_square(packed[part] - expected[part])
            if not difference <= _NOISE_FACTOR * noise:
                return (
                    f"its log-probabilities on packed rows differ by {difference:.1e} from those "
                    f"on separate ones, where rounding explains {noise:.1e}"
                )
        return None

    def _gradient_at_chosen_tokens(self) -> float:
        """Largest derivative of the rejected tokens' log-probabilities by the chosen tokens."""
        seen: list[Tensor] = []

        def keep(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            seen.append(output.detach().requires_grad_())
            return seen[-1]

        handle = self.causal_lm.get_input_embeddings().register_forward_hook(keep)
        try:
            with torch.enable_grad(), self._packed():
                total = self._log_probs(self.tree)[self.rejected].sum()
                (gradient,) = torch.autograd.grad(total, seen[0])
        finally:
            handle.remove()
        places = [gradient[0, start:end].abs().max() for start, end in self._chosen_places()]
        return float(torch.stack(places).max())

    def _noise(self, expected: Tensor) -> float:
        """What the order of summation alone changes: SDPA against the model's eager attention."""
        own = self.causal_lm.config._attn_implementation
        found = 0.0
        for other in ("eager", "sdpa"):
            if other == own:
                continue
            try:
                with attention_of_trees(self.causal_lm, other):
                    again = self._log_probs(self.separate)
            except Exception as error:  # noqa: BLE001 (not every model has both)
                if is_out_of_memory(error):
                    raise
                continue
            found = max(found, _root_mean_square(again - expected))
        # Where both happen to agree, the rounding of the dtype that it computes in remains.
        eps = torch.finfo(computes_on(self.causal_lm)[1]).eps
        return max(found, eps * _root_mean_square(expected) / 2)

    def _packed(self) -> Any:
        return attention_of_trees(self.causal_lm, self.attention)

    def _log_probs(self, row: RowBatch) -> Tensor:
        result: Tensor = self.model(**row.inputs, score_rows=(row.score_index, row.targets))
        return result

    def _chosen_places(self) -> list[tuple[int, int]]:
        spans = self.tree.inputs["tree_spans"]
        return [(start + prompt, start + prompt + sides[0]) for start, prompt, sides in spans]

    def _pairs(self) -> list[PlannedPair]:
        tokens = iter((7 * number + 3) % self.vocabulary for number in range(1, 1000))

        def take(count: int) -> list[int]:
            return [next(tokens) for _ in range(count)]

        return [PlannedPair(take(p), take(c), take(r), is_scored=True) for p, c, r in _LENGTHS]


def _windowed_layers(causal_lm: Any) -> int:
    """Layers that attend in a sliding window when the model makes its own masks."""
    home = sys.modules[type(causal_lm).__module__]
    if not hasattr(home, "create_sliding_window_causal_mask"):
        return 0  # a window in the configuration is not used
    config = causal_lm.config.get_text_config()
    layer_types = getattr(config, "layer_types", None)
    if layer_types:
        return sum(kind == "sliding_attention" for kind in layer_types)
    has_window = getattr(config, "sliding_window", None) is not None
    is_used = getattr(config, "use_sliding_window", True)
    return int(config.num_hidden_layers) if has_window and is_used else 0


def _order(row: RowBatch) -> Tensor:
    """Brings scored positions into an order that the layout does not change."""
    # Stable: within a completion, positions stand in sequence in every layout; prompts (-1) stand
    # pair after pair.
    return torch.sort(row.completion_ids, stable=True).indices


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
