"""What figures are made of: log-probabilities and lengths of pairs, as arrays."""

from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from .intervals import Array


class Scores(NamedTuple):
    """Of N pairs by one model. All [N]."""

    chosen: Array
    """Log-probability of each chosen completion, summed over its tokens; nats."""
    rejected: Array
    """The same of the rejected ones."""
    chosen_tokens: NDArray[numpy.int64]
    """With the end token; at least 1."""
    rejected_tokens: NDArray[numpy.int64]

    @classmethod
    def of(cls, scores: Any) -> "Scores":
        """From a `PairScores`, or anything with these four names that numpy can read.

        Raises:
            ValueError: there are no pairs, the shapes do not fit, or a log-probability is not
                finite.
        """
        chosen, rejected = (
            numpy.asarray(part, numpy.float64) for part in (scores.chosen, scores.rejected)
        )
        lengths = [
            numpy.asarray(part, numpy.int64)
            for part in (scores.chosen_tokens, scores.rejected_tokens)
        ]
        shapes = {part.shape for part in (chosen, rejected, *lengths)}
        if len(shapes) != 1 or chosen.ndim != 1 or not len(chosen):
            raise ValueError(f"scores must be four arrays [N], N at least 1; found {shapes}")
        not_finite = int((~(numpy.isfinite(chosen) & numpy.isfinite(rejected))).sum())
        if not_finite:
            raise ValueError(f"{not_finite} pairs have a log-probability that is not finite")
        return cls(chosen, rejected, *lengths)

    def of_pairs(self, which: NDArray[Any]) -> "Scores":
        """Those of some pairs, by mask or by number."""
        return Scores(*(part[which] for part in self))

    @property
    def mean_chosen(self) -> Array:
        """Mean log-probability over the tokens of each chosen completion."""
        return self.chosen / self.chosen_tokens

    @property
    def mean_rejected(self) -> Array:
        """The same of the rejected ones."""
        return self.rejected / self.rejected_tokens

    @property
    def log_odds(self) -> Array:
        """Log odds of chosen minus log odds of rejected, arXiv 2403.07691 equation 4."""
        return _log_odds(self.mean_chosen) - _log_odds(self.mean_rejected)


def preference(margins: Array) -> Array:
    """1 where the chosen completion is ahead, 0 where it is behind, 0.5 where neither is."""
    return (numpy.sign(margins) + 1) / 2


def _log_odds(mean_logp: Array) -> Array:
    # As in the loss: expm1 keeps 1 - p exact where p is near 1, and memorised text stays finite.
    a = numpy.maximum(-mean_logp, 1e-35)
    return -a - numpy.log(-numpy.expm1(-a))
