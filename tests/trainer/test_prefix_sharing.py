"""Training on packed rows: what the user is told, and that a step is what separate rows make it."""

import logging

import pytest
import torch
from tiny_models import (
    plain_rows,
    quiet_config,
    step_gradients,
    tiny_model,
    trainer_for,
    whole_relative_error,
    with_lora,
)
from transformers import TrainerCallback
from tree_families import decide, exact_model, longer_rows, refused_model

from lite_orpo.data.row_batch import PlannedPair
from lite_orpo.data.tree_rows import tree_row_batch
from lite_orpo.errors import ModelError

# PEFT, of experts that "all-linear" does not reach.
pytestmark = pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")


# ---- what the user sees ----


def test_auto_falls_back_and_says_why_and_what_it_costs(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = trainer_for(with_lora(refused_model("lfm2")), tmp_path, plain_rows(4))
    assert not trainer.sharing.is_on
    (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("rows:")]
    assert "separate, padded: it has layers of type conv" in line
    assert "packed rows would take 1." in line
    assert "fewer tokens" in line
    trainer.train()


def test_on_refuses_a_model_that_cannot_in_one_line(tmp_path):
    with pytest.raises(ModelError) as caught:
        trainer_for(with_lora(refused_model("lfm2")), tmp_path, prefix_sharing="on")
    text = str(caught.value)
    assert text.startswith("prefix_sharing: on, but Lfm2ForCausalLM cannot: it has layers of type")
    assert text.endswith("set it to auto or off")
    assert "\n" not in text


def test_varlen_on_a_cpu_is_refused_with_its_reason(tmp_path):
    with pytest.raises(ModelError, match="tree_attention: varlen: it needs a CUDA device"):
        trainer_for(with_lora(tiny_model()), tmp_path, prefix_sharing="on", tree_attention="varlen")


def test_the_rows_are_described_with_the_tokens_saved(tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()), tmp_path, plain_rows(6), per_device_train_batch_size=3
    )
    pairs = list(trainer.train_dataset)
    packed = sum(
        len(pair[f"{part}_input_ids"]) for pair in pairs for part in
        ("prompt", "chosen", "rejected")
    )  # fmt: skip
    assert f"{packed:,} tokens an epoch" in trainer.rows_description
    assert "fewer than padded batches of 3" in trainer.rows_description
    separate = packed + sum(len(pair["prompt_input_ids"]) for pair in pairs)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert 0 < log["lite_orpo/tokens_saved"] < 1
    assert log["lite_orpo/rows_per_step"] == 1
    assert f"{separate / packed:.2f}x fewer than separate" in trainer.rows_description


def test_off_does_not_touch_the_attention(tmp_path):
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, prefix_sharing="off")
    assert trainer.rows_description == "separate, padded (as configured)"
    with trainer.sharing.attending(trainer.model):
        assert trainer.model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"neftune_noise_alpha": 5.0}, "NEFTune's noise goes by the length of the row"),
        ({"torch_compile": True}, "torch.compile would compile anew"),
    ],
    ids=["neftune", "compile"],
)
def test_settings_that_go_by_the_row_turn_packing_off(settings, reason, tmp_path):
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, **settings)
    assert not trainer.sharing.is_on
    assert reason in trainer.rows_description


def test_a_compiled_model_turns_packing_off(tmp_path):
    model = with_lora(tiny_model())
    model.compile(backend="eager")
    assert not trainer_for(model, tmp_path).sharing.is_on


@pytest.mark.parametrize("value", [False, "off"])
def test_off_may_be_a_boolean(value, tmp_path):
    assert quiet_config(tmp_path, prefix_sharing=value).prefix_sharing == "off"
    assert quiet_config(tmp_path, prefix_sharing=True).prefix_sharing == "on"


# ---- around the step ----


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
def test_training_follows_an_evaluation_in_inference_mode(family, tmp_path):
    trainer = trainer_for(
        with_lora(exact_model(family)), tmp_path, plain_rows(2), eval_dataset=plain_rows(2),
        prefix_sharing="on", max_steps=1,
    )  # fmt: skip
    with torch.inference_mode():
        trainer.evaluate()
    trainer.train()


def test_a_second_training_reports_nothing_of_the_first(tmp_path):
    logs = []
    for first_steps in (0, 1):
        trainer = trainer_for(
            with_lora(tiny_model()), tmp_path, learning_rate=0.0, max_steps=2, logging_steps=2
        )
        if first_steps:
            trainer.args.max_steps = first_steps
            trainer.train()
            trainer.args.max_steps = 2
        trainer.train()
        lines = [log for log in trainer.state.log_history if "nll_loss" in log]
        logs.append(lines[-1]["nll_loss"])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


class Answers(TrainerCallback):
    """Generates in the middle of a training, as callbacks that show samples do."""

    def __init__(self):
        self.answers = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        prompt = torch.tensor([[1, 7, 8, 9]])
        with torch.no_grad():
            self.answers.append(model.generate(input_ids=prompt, max_new_tokens=3))


def test_callbacks_can_generate_while_packed_rows_are_trained(tmp_path):
    callback = Answers()
    trainer = trainer_for(
        with_lora(tiny_model()),
        tmp_path,
        prefix_sharing="on",
        callbacks=[callback],
        max_steps=2,
    )
    trainer.train()
    assert [answer.shape for answer in callback.answers] == [(1, 7)] * 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_keeps_the_layout(reentrant, tmp_path):
    found = []
    for extra in (
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
        },
    ):
        trainer = trainer_for(
            with_lora(exact_model("gemma2")),
            tmp_path,
            longer_rows(4),
            prefix_sharing="on",
            max_steps=1,
            max_grad_norm=0.0,
            learning_rate=0.1,
            optim="sgd",
            **extra,
        )
        trainer.train()
        found.append(
            {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora" in n}
        )
    # The same operations on the same numbers.
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    "lengths", [(1, 4, 3), (4, 1, 3), (4, 3, 1), (1, 1, 1)], ids=lambda lengths: f"{lengths}"
)
def test_the_shortest_pairs_are_scored_as_separate_sequences_are(lengths, tmp_path):
    prompt, chosen, rejected = lengths
    ids = list(range(6, 6 + sum(lengths)))
    pair = {
        "prompt_input_ids": ids[:prompt],
        "chosen_input_ids": ids[prompt : prompt + chosen],
        "rejected_input_ids": ids[prompt + chosen :],
        "length": prompt + max(chosen, rejected),
        "row": 0,
    }
    found = []
    for sharing in ("on", "off"):
        trainer = trainer_for(with_lora(tiny_model()), tmp_path, prefix_sharing=sharing)
        found.append(step_gradients(trainer, [[pair]]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert whole_relative_error(found[0][1], found[1][1]) <= 2e-6


def test_bf16_rows_are_as_near_to_fp32_as_separate_ones_are(tmp_path):
    rows = longer_rows(6)

    def loss_and_gradients(dtype, sharing):
        torch.manual_seed(0)
        model = with_lora(tiny_model(dtype=dtype))
        for name, parameter in model.named_parameters():
            if "lora" in name:
                parameter.data = parameter.data.float()
        trainer = trainer_for(model, tmp_path, rows, prefix_sharing=sharing)
        return step_gradients(trainer, [list(trainer.train_dataset)])

    true_loss, true = loss_and_gradients(torch.float32, "off")
    errors, losses = {}, {}
    for sharing in ("on", "off"):
        loss, gradients = loss_and_gradients(torch.bfloat16, sharing)
        errors[sharing] = whole_relative_error(gradients, true)
        losses[sharing] = abs(loss - true_loss)
    assert errors["on"] <= 2 * errors["off"]
    # Of a loss of 6, a rounding of bf16 in the logits moves single tokens by some hundredths.
    assert losses["on"] <= 2 * losses["off"] + 1e-2


def rejected_logps(model, pairs, sharing):
    row = tree_row_batch(pairs, nll_on_prompt=True)
    with torch.no_grad(), sharing.attending(model):
        logps = model(**row.inputs, score_rows=(row.score_index, row.targets))
    return {number: logps[row.completion_ids == number] for number in range(2 * len(pairs))}


# Not a mixture of experts: how its products round goes by how many tokens an expert gets.
@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral window", "qwen3", "gpt2"])
@pytest.mark.parametrize("changed", [0, 1, 2, 3])
def test_changing_one_completion_leaves_every_other_bitwise_as_it_was(family, changed):
    model = with_lora(exact_model(family)).eval()
    sharing = decide(model)
    pairs = [
        PlannedPair([7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17, 18], is_scored=True),
        PlannedPair([19], [20, 21], [22, 23, 24], is_scored=True),
    ]
    before = rejected_logps(model, pairs, sharing)
    field = "rejected" if changed % 2 else "chosen"
    pair = pairs[changed // 2]
    other = [token + 30 for token in getattr(pair, field)]
    pairs[changed // 2] = pair._replace(**{field: other})
    after = rejected_logps(model, pairs, sharing)
    for number in before:
        assert torch.equal(before[number], after[number]) == (number != changed)


def test_shuffled_pairs_make_the_same_loss_and_gradients(tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()), tmp_path, plain_rows(6), prefix_sharing="on", max_tokens_per_row=90
    )
    pairs = list(trainer.train_dataset)
    loss, gradients = step_gradients(trainer, [pairs])
    again, shuffled = step_gradients(trainer, [[pairs[i] for i in (3, 0, 5, 1, 4, 2)]])
    assert again == pytest.approx(loss, rel=1e-6)
    assert whole_relative_error(shuffled, gradients) <= 1e-6
