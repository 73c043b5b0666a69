"""How a step is cut into batches changes neither its gradient nor what is logged or evaluated."""

import pytest
import torch
from tiny_models import (
    GradientRecorder,
    of_the_loss,
    plain_rows,
    relative_error,
    step_gradients,
    tiny_model,
    trainer_for,
    whole_relative_error,
    with_lora,
)

ROWS = plain_rows(4)


def one_step(output_dir, batch, accumulation, **settings):
    """The gradient and the log of one step of Trainer's own loop over four pairs."""
    recorder = GradientRecorder()
    trainer = trainer_for(
        with_lora(tiny_model()),
        output_dir,
        ROWS,
        callbacks=[recorder],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=1,
        max_grad_norm=0.0,
        optim="sgd",
        **settings,
    )
    trainer.train()
    (gradients,) = recorder.steps
    (log,) = [log for log in trainer.state.log_history if "loss" in log]
    return gradients, log


@pytest.fixture(scope="module")
def uncut(tmp_path_factory):
    return one_step(tmp_path_factory.mktemp("uncut"), 4, 1)


CUTS = pytest.mark.parametrize(
    ("batch", "accumulation"), [(2, 2), (1, 4), (3, 2)], ids=["2x2", "1x4", "3x2"]
)
ROW_SETTINGS = [
    {"prefix_sharing": "on"},
    {"prefix_sharing": "on", "max_tokens_per_row": 2},
    {"prefix_sharing": "on", "max_tokens_per_row": 75},
    {"prefix_sharing": "off"},
    {"prefix_sharing": "off", "max_tokens_per_row": 2},
    {"prefix_sharing": "off", "max_tokens_per_row": 120},
]


@pytest.mark.parametrize("settings", ROW_SETTINGS, ids=lambda s: "-".join(map(str, s.values())))
def test_packed_or_padded_in_one_row_or_many_a_step_has_the_same_gradient(
    settings, uncut, tmp_path
):
    gradients, log = one_step(tmp_path, 2, 2, **settings)
    assert whole_relative_error(gradients, uncut[0]) <= 1e-6
    # Packed rows attend by SDPA, padded ones by the model's eager function, in fp32.
    assert relative_error(gradients, uncut[0]) <= 3e-6
    for key in of_the_loss(log):
        assert log[key] == pytest.approx(uncut[1][key], rel=1e-5), key


@CUTS
def test_every_cut_of_a_step_has_the_gradient_of_the_whole(batch, accumulation, uncut, tmp_path):
    gradients, _ = one_step(tmp_path, batch, accumulation)
    # The same sums in another order, in fp32.
    assert relative_error(gradients, uncut[0]) <= 1e-6


@CUTS
def test_every_cut_of_a_step_logs_the_figures_of_the_whole(batch, accumulation, uncut, tmp_path):
    _, log = one_step(tmp_path, batch, accumulation)
    assert log.keys() == uncut[1].keys()
    for key in of_the_loss(log):
        assert log[key] == pytest.approx(uncut[1][key], rel=1e-5), key


def test_the_logged_loss_is_the_loss_of_the_pairs(uncut, tmp_path):
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, ROWS)
    expected = direct_figures(trainer.model, list(trainer.train_dataset), alpha=0.1)
    for key, value in expected.items():
        assert uncut[1][key] == pytest.approx(value, rel=1e-5), key


def test_the_loss_is_logged_as_the_mean_over_the_steps_since_the_last_line(tmp_path):
    logs = {}
    for every in (1, 3):
        trainer = trainer_for(
            with_lora(tiny_model()),
            tmp_path,
            plain_rows(12),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            max_steps=6,
            learning_rate=0.01,
            logging_steps=every,
        )
        trainer.train()
        logs[every] = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs[1]) == 6
    assert len(logs[3]) == 2
    for number, log in enumerate(logs[3]):
        steps = logs[1][3 * number : 3 * number + 3]
        for key in ("loss", "nll_loss", "rewards/margins", "log_odds_ratio", "logps/chosen"):
            mean = sum(step[key] for step in steps) / 3
            assert log[key] == pytest.approx(mean, rel=1e-5, abs=1e-7), key


def test_a_batch_left_over_at_the_epochs_end_is_a_step_of_its_own(tmp_path):
    recorder = GradientRecorder()
    trainer = trainer_for(
        with_lora(tiny_model()),
        tmp_path,
        plain_rows(5),
        callbacks=[recorder],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
    )
    trainer.train()
    assert len(recorder.steps) == 2
    _, expected = step_gradients(trainer, [[trainer.train_dataset[4]]])
    assert relative_error(recorder.steps[1], expected) <= 1e-6


# ---- evaluation ----


@torch.no_grad()
def direct_figures(model, pairs, alpha):
    """Loss and metrics from the model's own logits in fp64, pair by pair."""
    nll_sum = tokens = 0.0
    sums = dict.fromkeys(("chosen", "rejected", "accuracy", "log_odds", "ratio"), 0.0)
    for pair in pairs:
        prompt, means = pair["prompt_input_ids"], []
        for column in ("chosen_input_ids", "rejected_input_ids"):
            ids = torch.tensor([prompt + pair[column]])
            logits = model(input_ids=ids).logits[0, :-1].double()
            logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            means.append(logps[len(prompt) - 1 :].mean())
            if column == "chosen_input_ids":
                nll_sum -= float(logps.sum())
                tokens += len(logps)
        odds = [mean - torch.log1p(-mean.exp()) for mean in means]
        sums["chosen"] += float(means[0])
        sums["rejected"] += float(means[1])
        sums["accuracy"] += float(means[0] > means[1])
        sums["log_odds"] += float(odds[0] - odds[1])
        sums["ratio"] += float(torch.nn.functional.logsigmoid(odds[0] - odds[1]))
    mean = {name: value / len(pairs) for name, value in sums.items()}
    return {
        "loss": nll_sum / tokens - alpha * mean["ratio"],
        "nll_loss": nll_sum / tokens,
        "log_odds_ratio": mean["ratio"],
        "log_odds_chosen": mean["log_odds"],
        "logps/chosen": mean["chosen"],
        "logps/rejected": mean["rejected"],
        "rewards/chosen": alpha * mean["chosen"],
        "rewards/rejected": alpha * mean["rejected"],
        "rewards/margins": alpha * (mean["chosen"] - mean["rejected"]),
        "rewards/accuracies": mean["accuracy"],
    }


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_evaluation_is_exact_for_every_batch_size(batch, tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()),
        tmp_path,
        eval_dataset=plain_rows(7),
        per_device_eval_batch_size=batch,
        beta=0.3,
    )
    metrics = trainer.evaluate()
    expected = direct_figures(trainer.model, list(trainer.eval_dataset), alpha=0.3)
    assert 0 < expected["rewards/accuracies"] < 1
    for key, value in expected.items():
        # fp32 log-probabilities against fp64.
        assert metrics[f"eval_{key}"] == pytest.approx(value, rel=1e-5), key


def test_evaluating_twice_gives_the_same_and_leaves_the_training_figures_alone(tmp_path):
    settings = {"max_steps": 4, "logging_steps": 4, "learning_rate": 0.01}
    logs = []
    for extra in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = trainer_for(
            with_lora(tiny_model()), tmp_path, eval_dataset=plain_rows(3), **settings, **extra
        )
        trainer.train()
        logs.append(next(log for log in trainer.state.log_history if "loss" in log))
    for key in of_the_loss(logs[0]):
        assert logs[0][key] == logs[1][key], key
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]
    evaluated = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert evaluated[0]["eval_loss"] > evaluated[3]["eval_loss"]


def test_strength_and_temperature_enter_the_loss_as_the_configuration_says(tmp_path):
    base = {"eval_dataset": plain_rows(5)}
    plain = trainer_for(with_lora(tiny_model()), tmp_path, beta=0.0, **base).evaluate()
    assert plain["eval_loss"] == pytest.approx(plain["eval_nll_loss"])
    strong = trainer_for(with_lora(tiny_model()), tmp_path, beta=2.0, **base).evaluate()
    difference = strong["eval_loss"] - plain["eval_loss"]
    assert difference == pytest.approx(-2.0 * strong["eval_log_odds_ratio"])
    course = {"orpo_alpha": 2.0, "orpo_beta": 0.5}
    warm = trainer_for(with_lora(tiny_model()), tmp_path, **course, **base).evaluate()
    assert warm["eval_log_odds_chosen"] == pytest.approx(strong["eval_log_odds_chosen"])
    assert warm["eval_log_odds_ratio"] != pytest.approx(strong["eval_log_odds_ratio"], rel=1e-3)
    assert warm["eval_rewards/chosen"] == pytest.approx(2.0 * 0.5 * warm["eval_logps/chosen"])


def test_completion_only_nll_leaves_the_prompt_out(tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()), tmp_path, nll_tokens="completion", eval_dataset=plain_rows(5)
    )
    pairs = list(trainer.eval_dataset)
    metrics = trainer.evaluate()
    lengths = [len(pair["chosen_input_ids"]) for pair in pairs]
    means = [direct_figures(trainer.model, [pair], 0.1)["logps/chosen"] for pair in pairs]
    expected = -sum(m * n for m, n in zip(means, lengths, strict=True)) / sum(lengths)
    assert metrics["eval_nll_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("sharing", ["on", "off"])
def test_only_positions_that_carry_a_target_reach_the_head(sharing, tmp_path, monkeypatch):
    import lite_orpo.model.head as head_module

    rows_seen = []
    fused = head_module.fused_linear_logprobs

    def counted(hidden, *args, **kwargs):
        rows_seen.append(hidden.shape[0])
        return fused(hidden, *args, **kwargs)

    trainer = trainer_for(with_lora(tiny_model()), tmp_path, plain_rows(6), prefix_sharing=sharing)
    monkeypatch.setattr(head_module, "fused_linear_logprobs", counted)
    pairs = list(trainer.train_dataset)
    step_gradients(trainer, [pairs])
    prompts = sum(len(pair["prompt_input_ids"]) - 1 for pair in pairs)
    completions = sum(
        len(pair["chosen_input_ids"]) + len(pair["rejected_input_ids"]) for pair in pairs
    )
    assert sum(rows_seen) == prompts + completions
