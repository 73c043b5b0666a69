"""The loss, its gradients, metrics and token ids are those of TRL 1.16's ORPOTrainer."""

import datasets
import pytest
from tiny_models import (
    TOKENIZER,
    plain_rows,
    relative_error,
    step_gradients,
    tiny_model,
    trainable_gradients,
    trainer_for,
    with_lora,
)
from trl.experimental.orpo import ORPOConfig as TRLConfig
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

BETA = 0.1
ROWS = plain_rows(6)
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "nll_loss",
    "log_odds_ratio",
    "log_odds_chosen",
)


def trl_trainer(model, output_dir, rows):
    args = TRLConfig(
        output_dir=str(output_dir),
        beta=BETA,
        max_length=200,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        disable_dropout=True,
        report_to="none",
        remove_unused_columns=False,
    )
    return TRLTrainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=TOKENIZER,
    )


def trl_step(trainer):
    trainer.model.zero_grad()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(ROWS))])
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model.train(), batch)
    loss.backward()
    return float(loss.detach()), metrics, trainable_gradients(trainer.model)


def lora(name):
    return with_lora(tiny_model(name))


def untied(name):
    return tiny_model(name, tie_word_embeddings=False)


def tied(name):
    return tiny_model(name, tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lora, "llama"),
        (lora, "gemma2"),
        (lora, "gpt2"),
        (lora, "cohere"),
        (untied, "llama"),
        (tied, "llama"),
        (untied, "granite"),
        (tied, "gemma2"),
        (tied, "gpt2"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_loss_metrics_and_gradients_equal_trl(make, name, tmp_path):
    theirs = trl_trainer(make(name), tmp_path, ROWS)
    ours = trainer_for(make(name), tmp_path, ROWS, beta=BETA, per_device_train_batch_size=6)
    assert ours.head.is_fused
    loss, gradients = step_gradients(ours, [list(ours.train_dataset)])
    their_loss, their_metrics, their_gradients = trl_step(theirs)
    # fp32 rounds a loss of a few nats at 2e-7.
    assert loss == pytest.approx(their_loss, rel=1e-6)
    # Sums over some hundred tokens in another order; two orders above a rounding.
    assert relative_error(gradients, their_gradients) <= 1e-5
    ours.log({"loss": loss})
    metrics = ours.state.log_history[-1]
    for metric in METRICS:
        assert metrics[metric] == pytest.approx(their_metrics[metric], rel=1e-5, abs=1e-6), metric


def test_an_untied_and_a_tied_head_both_receive_a_gradient(tmp_path):
    for make in (untied, tied):
        trainer = trainer_for(make("llama"), tmp_path, ROWS)
        _, gradients = step_gradients(trainer, [list(trainer.train_dataset)])
        trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert gradients.keys() == trained
        assert ("lm_head.weight" in trained) == (make is untied)


def test_token_ids_of_plain_rows_equal_trls(tmp_path):
    rows = [
        *ROWS,
        {"prompt": "", "chosen": "a", "rejected": "b"},
        {"prompt": "<s>q", "chosen": "a</s>", "rejected": " b "},
        {"prompt": "tabs\tand\nbreaks ", "chosen": "x\n", "rejected": "\u00e9"},
    ]
    theirs = trl_trainer(tiny_model(), tmp_path, rows).train_dataset
    ours = trainer_for(tiny_model(), tmp_path, rows).train_dataset
    for their_row, row in zip(theirs, ours, strict=True):
        for column in ("chosen", "rejected"):
            ids = row["prompt_input_ids"] + row[f"{column}_input_ids"]
            assert ids == their_row[f"{column}_input_ids"]
            begin = len(row["prompt_input_ids"])
            assert their_row[f"{column}_labels"] == [-100] * begin + ids[begin:]


def test_several_batches_of_unequal_length_weigh_as_one_batch_in_trl(tmp_path):
    ours = trainer_for(lora("llama"), tmp_path, ROWS, beta=BETA, per_device_train_batch_size=1)
    loss, gradients = step_gradients(ours, [[pair] for pair in ours.train_dataset])
    their_loss, _, their_gradients = trl_step(trl_trainer(lora("llama"), tmp_path, ROWS))
    assert loss == pytest.approx(their_loss, rel=1e-6)
    assert relative_error(gradients, their_gradients) <= 1e-5
