"""`loss_type`: every loss trains, whatever the rows, and its settings are checked."""

import pytest
import torch
from tiny_models import (
    plain_rows,
    step_gradients,
    tiny_model,
    trainer_for,
    whole_relative_error,
    with_lora,
)

from lite_orpo import ORPOConfig
from lite_orpo.config.loss_types import LOSS_TYPES
from lite_orpo.errors import ConfigError

ALL = pytest.mark.parametrize("loss_type", LOSS_TYPES)


@ALL
def test_training_lowers_the_held_out_loss_and_leaves_the_base_alone(loss_type, tmp_path):
    model = with_lora(tiny_model())
    base = model.base_model.model.lm_head.weight.clone()
    rows = plain_rows(12)
    trainer = trainer_for(
        model, tmp_path, rows, eval_dataset=rows, loss_type=loss_type, max_steps=8,
        learning_rate=0.01, per_device_train_batch_size=6,
    )  # fmt: skip
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    if loss_type != "sft":
        assert after["eval_rewards/margins"] > before["eval_rewards/margins"]
    assert torch.equal(model.base_model.model.lm_head.weight, base)


@ALL
def test_the_gradient_does_not_depend_on_how_the_step_is_cut(loss_type, tmp_path):
    def gradients(**settings):
        trainer = trainer_for(
            with_lora(tiny_model()), tmp_path, plain_rows(6), loss_type=loss_type,
            per_device_train_batch_size=6, **settings,
        )  # fmt: skip
        trainer.train_dataset = trainer._reference.on(trainer, trainer.train_dataset)
        loss, found = step_gradients(trainer, [list(trainer.train_dataset)])
        return loss, found

    loss, whole = gradients(prefix_sharing="on")
    for settings in (
        {"prefix_sharing": "on", "max_tokens_per_row": 60},
        {"prefix_sharing": "off"},
        {"prefix_sharing": "off", "max_tokens_per_row": 60},
    ):
        other_loss, cut = gradients(**settings)
        assert other_loss == pytest.approx(loss, rel=2e-6)
        # As packed against padded with ORPO: SDPA's rounding.
        assert whole_relative_error(cut, whole) <= 1e-5


@ALL
def test_evaluation_is_exact_for_any_batch_size(loss_type, tmp_path):
    def metrics(size):
        trainer = trainer_for(
            with_lora(tiny_model()), tmp_path, eval_dataset=plain_rows(7), loss_type=loss_type,
            per_device_eval_batch_size=size,
        )  # fmt: skip
        found = trainer.evaluate()
        return {k: v for k, v in found.items() if "logps" in k or "loss" in k or "rewards" in k}

    one, all_at_once = metrics(1), metrics(7)
    assert one == pytest.approx(all_at_once, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_sft_does_not_pass_rejected_completions_in_training(sharing, tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()), tmp_path, loss_type="sft", prefix_sharing=sharing,
        eval_dataset=plain_rows(4), per_device_train_batch_size=4,
    )  # fmt: skip
    pairs = list(trainer.train_dataset)
    (entry,), _ = trainer.get_batch_samples(iter([{"pairs": pairs}]), 1, trainer.args.device)
    (row,) = entry["step"].rows
    chosen = [pair["prompt_input_ids"] + pair["chosen_input_ids"] for pair in pairs]
    assert row.tokens == sum(map(len, chosen))
    positions = row.inputs["input_ids"].numel()
    longest = max(map(len, chosen))
    assert positions == (row.tokens if sharing == "on" else 4 * longest)
    assert "eval_rewards/accuracies" in trainer.evaluate()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpoo"}, "loss_type must be one of orpo, dpo, .*did you mean dpo"),
        ({"loss_type": "sigmoid"}, "found 'sigmoid'; did you mean dpo"),
        ({"loss_type": "dpo", "orpo_alpha": 0.1}, "orpo_alpha belongs to loss_type orpo"),
        ({"simpo_gamma": 0.5}, "simpo_gamma belongs to loss_type simpo"),
        ({"loss_type": "dpo", "cpo_alpha": 1.0}, "cpo_alpha belongs to loss_type cpo"),
        ({"loss_type": "sft", "beta": 0.1}, "beta has no meaning with loss_type sft"),
        ({"loss_type": "ipo", "beta": 0}, "beta must be positive with loss_type ipo"),
        ({"loss_type": "simpo", "simpo_gamma": -1}, "simpo_gamma must be a number and not neg"),
        ({"loss_type": "cpo", "cpo_alpha": float("nan")}, "cpo_alpha must be a number"),
    ],
)
def test_settings_that_do_not_belong_together_are_one_line(settings, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        ORPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("loss_type", "beta", "nll_tokens"),
    [
        ("orpo", 0.1, "prompt_and_completion"),
        ("dpo", 0.1, "completion"),
        ("simpo", 2.0, "completion"),
    ],
)
def test_each_loss_has_its_own_defaults(loss_type, beta, nll_tokens, tmp_path):
    args = ORPOConfig(output_dir=str(tmp_path), use_cpu=True, loss_type=loss_type)
    assert args.preference_beta == beta
    assert args.nll_tokens == nll_tokens
