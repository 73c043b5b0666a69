"""The table under a training in a notebook: the figures that are read, not all fourteen.

transformers draws it, with a column for every metric and three for speed. Here a line has loss,
margin, accuracy and log odds; everything stays in `trainer.state.log_history`. IPython is
imported by transformers' own module only, so this is a no-op outside notebooks.
"""

from typing import Any

_SHOWN = {
    "loss": "loss",
    "rewards/margins": "margin",
    "rewards/accuracies": "accuracy",
    "log_odds_chosen": "log odds",
}
_DRAWN_BY = "NotebookProgressCallback"


def shorten_table(trainer: Any) -> None:
    """Let transformers' table, where the trainer has one, show few columns.

    Args:
        trainer: a `transformers.Trainer`.
    """
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if type(callback).__name__ == _DRAWN_BY:
            callbacks[place] = _short_table()


def short_figures(metrics: dict[str, Any]) -> dict[str, Any]:
    """Those that are shown, under short names; prefixes (`eval_`, `eval_helpful_`) stay."""
    found = {}
    for key, value in metrics.items():
        for metric, name in _SHOWN.items():
            prefix = key.removesuffix(metric)
            # "eval_nll_loss" ends with "loss", too.
            if prefix != key and not prefix.endswith("nll_"):
                found[prefix + name] = value
    return found


def _short_table() -> Any:
    from transformers.utils.notebook import NotebookProgressCallback

    class ShortTable(NotebookProgressCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
        ) -> None:
            if self.training_tracker is None or args.eval_strategy != "no" or "loss" not in logs:
                return
            shown = short_figures(logs)
            values = {"Step": state.global_step, "Training Loss": shown.pop("loss")}
            self.training_tracker.write_line(values | {k.capitalize(): shown[k] for k in shown})

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
        ) -> None:
            super().on_evaluate(args, state, control, short_figures(metrics or {}), **kwargs)

    return ShortTable()
