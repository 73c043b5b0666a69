"""README.md of an adapter: the model card, made only of what is known about the run."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .papers import citation

_PACKAGES = ("lite-orpo", "torch", "transformers", "peft", "datasets", "accelerate")


def write_card(
    path: Path,
    *,
    base_model: str,
    data: str,
    settings: dict[str, Any],
    before: dict[str, float],
    after: dict[str, float],
    has_adapter: bool,
    loss_type: str = "orpo",
    is_local: bool = False,
) -> None:
    """Write the card.

    Args:
        path: the file.
        base_model: name of the base model, without a local path.
        data: name of the training data, without a local path.
        settings: hyperparameters worth reading.
        before: held-out metrics of the base model; may be empty.
        after: held-out metrics after training; may be empty.
        has_adapter: whether the folder holds an adapter or a whole model.
        loss_type: the loss that it was trained by.
        is_local: the base model was a folder, so that its name is none on the hub.
    """
    library = "peft" if has_adapter else "transformers"
    lines = [
        "---",
        *([] if is_local else [f"base_model: {base_model}"]),
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        f"tags: [{loss_type}, lite-orpo, preference-alignment{', lora' if has_adapter else ''}]",
        "---",
        "",
        f"# {base_model}, trained on preferences by {loss_type.upper()}",
        "",
        f"{'A LoRA adapter for' if has_adapter else 'A fine-tuned version of'} `{base_model}`, "
        f"trained on the preference pairs of `{data}` with lite-orpo.",
        "",
    ]
    if has_adapter and is_local:
        lines += [
            f"`{base_model}` was a local folder. Load the base model from where you have it:",
            "`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), this_folder)`.",
            "",
        ]
    if after:
        lines += ["## Held-out results", "", *_result_table(before, after), ""]
    lines += ["## Settings", ""]
    lines += [f"- {key}: {value}" for key, value in settings.items() if value is not None]
    lines += ["", "## Versions", "", *_versions(), ""]
    paper = citation(loss_type)
    if paper is not None:
        lines += ["## Citation", "", "```bibtex", paper, "```", ""]
    path.write_text("\n".join(lines), encoding="utf-8")


RESULTS = (
    ("eval_rewards/accuracies", "reward accuracy"),
    ("eval_rewards/margins", "reward margin"),
    ("eval_log_odds_chosen", "log odds, chosen over rejected"),
    ("eval_nll_loss", "NLL of the chosen texts (nats a token)"),
    ("eval_loss", "loss"),
)


def _result_table(before: dict[str, float], after: dict[str, float]) -> list[str]:
    rows = ["| metric | before | after |", "|---|---|---|"]
    for key, label in RESULTS:
        if key in after:
            old = f"{before[key]:.3f}" if key in before else "not measured"
            rows.append(f"| {label} | {old} | {after[key]:.3f} |")
    return rows


def _versions() -> list[str]:
    lines = []
    for package in _PACKAGES:
        try:
            lines.append(f"- {package} {version(package)}")
        except PackageNotFoundError:
            continue
    return lines
