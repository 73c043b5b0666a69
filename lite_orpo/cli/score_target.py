"""Log-probabilities of held-out pairs, by a target and by what it was before its training."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..data.row_source import RowSource
from ..errors import DataError, ModelError
from ..evaluation.scores import Scores
from ..losses.objective import Objective
from ..model.adapter import adapter_switched_off
from ..model.load import load_config
from ..pair_scores import PairScores
from ..trainer import ORPOTrainer
from .library_refusals import library_refusals
from .target import Target, load_target_model, load_target_tokenizer, options_for


class ScoredTarget(NamedTuple):
    """Scores of a target, pair by pair."""

    after: Scores
    before: Scores | None
    """With the adapter off, or by the base of a whole model; None: no base is known."""
    rows: list[int]
    """Each pair's row in the source, counted from 0."""
    data_lines: list[str]
    """What became of the rows, in words."""
    rows_description: str
    """How they passed the model, packed or padded."""
    reward_scale: float | None
    """The beta of rewards; None where the run's loss does not compare mean log-probabilities."""


def score_target(
    target: Target, source: RowSource, look_at_rows: Callable[[list[int]], None] | None = None
) -> ScoredTarget:
    """Score pairs by the target's model, one model in memory at a time.

    Args:
        target: what to score by; `output_dir` of its configuration is where a trainer may write.
        source: the pairs.
        look_at_rows: is called with the rows that are going to be scored, before that takes its
            time; may raise.

    Raises:
        UserError: the model, its base or the pairs cannot be used.
    """
    tokenizer = load_target_tokenizer(target)
    found, prepared = _score_one(target, target, tokenizer, source, look_at_rows)
    if target.adapter is not None or target.base is None:
        return found
    gc.collect()  # a trainer and its model refer to each other
    before = target._replace(model=target.base)
    base, _ = _score_one(target, before, tokenizer, prepared, None)
    return found._replace(before=base.after)


def refuse_missing_base(target: Target) -> None:
    """Find out that a whole model's base is not there before the model itself is scored.

    Raises:
        ModelError: it is not there.
        HubError: the hub does not give it.
    """
    if target.adapter is None and target.base is not None:
        load_config(options_for(target, target.base))


def _score_one(
    target: Target,
    model: Target,
    tokenizer: Any,
    source: Any,
    look_at_rows: Callable[[list[int]], None] | None,
) -> tuple[ScoredTarget, Any]:
    args = target.config.training
    args.disable_tqdm = True
    where = Path(target.name)
    with library_refusals(where, (ImportError, ValueError, RuntimeError, OSError)):
        trainer = ORPOTrainer(
            model=load_target_model(model, is_scored=True),
            args=args,
            eval_dataset=source,
            processing_class=tokenizer,
        )
    if look_at_rows is not None:
        look_at_rows(list(trainer.eval_dataset["row"]))
    after, before = trainer.score_pairs(), None
    if target.adapter is not None:
        with adapter_switched_off(trainer.model):
            before = _checked(trainer.score_pairs(), "the base model")
    scored = ScoredTarget(
        _checked(after, model.name),
        before,
        after.rows.tolist(),
        [line for report in trainer.data_reports for line in report.lines()],
        trainer.rows_description,
        _reward_scale(trainer.objective),
    )
    return scored, trainer.eval_dataset


def _reward_scale(objective: Objective) -> float | None:
    is_of_means = objective.kind.is_of_means and not objective.kind.uses_reference
    return objective.reward_scale if is_of_means else None


def _checked(scores: PairScores, who: str) -> Scores:
    if not len(scores.rows):
        raise DataError("there are no pairs to evaluate on")
    try:
        return Scores.of(scores)
    except ValueError as error:
        raise ModelError(f"{who}: {error}; look at its weights, or try dtype=float32") from None
