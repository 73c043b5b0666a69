"""Loss, gradients and metrics of the other losses are those of TRL 1.16's trainers."""

import datasets
import pytest
import torch
from peft import LoraConfig
from tiny_models import (
    TOKENIZER,
    plain_rows,
    relative_error,
    step_gradients,
    tiny_model,
    trainable_gradients,
    trainer_for,
)
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer

ROWS = plain_rows(6)
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
COMMON = {
    "max_length": 200,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "report_to": "none",
    "remove_unused_columns": False,
}
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def moved(model):
    """The adapter, new until now, does something: model and reference differ."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.normal_(0.0, 0.2)
    return model


def trl_trainer(kind, arguments, output_dir):
    trainer = kind(
        model=tiny_model(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(ROWS),
        processing_class=TOKENIZER,
        peft_config=LoraConfig(**LORA),
    )
    moved(trainer.model).train().zero_grad()
    return trainer, list(trainer.train_dataset)


def our_tokens(output_dir):
    """Our token ids under the names of TRL's DPO, which begins these prompts without a BOS."""
    pairs = trainer_for(tiny_model(), output_dir, ROWS).train_dataset
    parts = ("prompt", "chosen", "rejected")
    return [{f"{part}_ids": pair[f"{part}_input_ids"] for part in parts} for pair in pairs]


def dpo_step(loss_type, output_dir, **settings):
    names = {"dpo": "sigmoid", "ipo": "ipo", "sft": "sft"}
    arguments = DPOConfig(
        output_dir=str(output_dir), loss_type=names[loss_type], **COMMON, **settings
    )
    trainer, _ = trl_trainer(DPOTrainer, arguments, output_dir)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(our_tokens(output_dir)))
    loss.backward()
    metrics = {key: sum(v) / len(v) for key, v in trainer._metrics["train"].items()}
    return float(loss.detach()), metrics, trainable_gradients(trainer.model)


def cpo_step(loss_type, output_dir, **settings):
    names = {"cpo": "sigmoid", "simpo": "simpo"}
    if loss_type == "simpo":
        settings["cpo_alpha"] = 0.0  # SimPO itself has no NLL
    arguments = CPOConfig(
        output_dir=str(output_dir), loss_type=names[loss_type], **COMMON, **settings
    )
    trainer, rows = trl_trainer(CPOTrainer, arguments, output_dir)
    batch = trainer.data_collator(rows)
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    return float(loss.detach()), metrics, trainable_gradients(trainer.model)


def our_step(loss_type, output_dir, **settings):
    trainer = trainer_for(
        tiny_model(),
        output_dir,
        ROWS,
        loss_type=loss_type,
        per_device_train_batch_size=6,
        peft_config=LoraConfig(**LORA),
        **settings,
    )
    moved(trainer.model)
    trainer.train_dataset = trainer._reference.on(trainer, trainer.train_dataset)
    loss, gradients = step_gradients(trainer, [list(trainer.train_dataset)])
    trainer.log({"loss": loss})
    return loss, trainer.state.log_history[-1], gradients


@pytest.mark.parametrize("sharing", ["on", "off"])
@pytest.mark.parametrize(
    ("loss_type", "their_step", "settings"),
    [
        ("dpo", dpo_step, {"beta": 0.1}),
        ("dpo", dpo_step, {"beta": 0.5}),
        ("ipo", dpo_step, {"beta": 0.2}),
        ("sft", dpo_step, {}),
        ("cpo", cpo_step, {"beta": 0.1, "cpo_alpha": 0.7}),
        ("simpo", cpo_step, {"beta": 2.0, "simpo_gamma": 0.9}),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_loss_metrics_and_gradients_equal_trl(loss_type, their_step, settings, sharing, tmp_path):
    their_loss, their_metrics, their_gradients = their_step(loss_type, tmp_path, **settings)
    loss, metrics, gradients = our_step(loss_type, tmp_path, prefix_sharing=sharing, **settings)
    # TRL sums up to 60 nats a completion in fp32, where a rounding is 4e-6; times beta 0.5. Our
    # formulas equal the papers' at 1e-12 (tests/losses).
    assert loss == pytest.approx(their_loss, rel=1e-6, abs=4e-6)
    # TRL sums its own fused log-probabilities; here, as there, some hundred tokens are summed.
    assert relative_error(gradients, their_gradients) <= 1e-5
    if loss_type in ("sft", "ipo"):
        return  # SFT compares nothing; TRL's IPO reports sums, though its loss goes by means
    for metric in METRICS:
        expected = float(their_metrics[metric])
        assert metrics[metric] == pytest.approx(expected, rel=1e-5, abs=1e-5), metric
