"""What transformers.Trainer offers works here too: callbacks, held-out sets, optimisers, inputs."""

import gc
import math
import weakref

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel
from tiny_models import TOKENIZER, plain_rows, quiet_config, tiny_model, trainer_for, with_lora
from torch import nn
from transformers import AutoModelForCausalLM, TrainerCallback

from lite_orpo import ORPOTrainer
from lite_orpo.errors import DataError

# ---- evaluation during training, callbacks ----


class Counter(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_step_begin(self, *args, **kwargs):
        self.seen.append("begin")

    def on_substep_end(self, *args, **kwargs):
        self.seen.append("substep")

    def on_step_end(self, *args, **kwargs):
        self.seen.append("end")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.seen.append("log")

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.seen.append(metrics["eval_loss"])


def test_callbacks_fire_once_a_step_and_can_stop_the_run(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    counter = Counter()
    trainer = trainer_for(
        with_lora(tiny_model()),
        tmp_path,
        plain_rows(8),
        callbacks=[counter, Stop()],
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
    )
    trainer.train()
    assert counter.seen == ["begin", "substep", "end", "log"] * 2


def test_several_held_out_sets_are_evaluated_by_name(tmp_path):
    sets = {"short": plain_rows(2), "long": datasets.Dataset.from_list(plain_rows(5))}
    trainer = trainer_for(
        with_lora(tiny_model()),
        tmp_path,
        eval_dataset=sets,
        max_steps=1,
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    logged = {name for log in trainer.state.log_history for name in log}
    assert {"eval_short_loss", "eval_long_loss", "eval_long_rewards/margins"} <= logged
    assert [report.source for report in trainer.data_reports] == [
        "train_dataset",
        "eval_dataset['short']",
        "eval_dataset['long']",
    ]
    metrics = trainer.evaluate()
    alone = trainer_for(trainer.model, tmp_path, eval_dataset=sets["long"]).evaluate()
    assert metrics["eval_long_loss"] == pytest.approx(alone["eval_loss"])


def test_other_raw_rows_can_be_given_to_evaluate(tmp_path):
    trainer = trainer_for(with_lora(tiny_model()), tmp_path, eval_dataset=plain_rows(5))
    held_out = trainer.evaluate()
    for rows in (plain_rows(5), datasets.Dataset.from_list(plain_rows(5))):
        given = trainer.evaluate(rows, metric_key_prefix="test")
        assert given["test_loss"] == held_out["eval_loss"]
    both = trainer.evaluate({"a": plain_rows(5), "b": plain_rows(2)})
    assert both["eval_a_loss"] == held_out["eval_loss"]
    assert both["eval_b_loss"] != held_out["eval_loss"]


def test_evaluate_without_held_out_pairs_says_so(tmp_path):
    with pytest.raises(DataError, match="eval_dataset"):
        trainer_for(with_lora(tiny_model()), tmp_path).evaluate()


# ---- optimisers, schedules, inputs ----


def test_an_optimizer_and_a_schedule_of_ones_own_are_used(tmp_path):
    model = with_lora(tiny_model())
    trained = [p for name, p in model.named_parameters() if "lora_B" in name]
    optimizer = torch.optim.SGD(trained, lr=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = trainer_for(model, tmp_path, optimizers=(optimizer, schedule), max_steps=2)
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_B" in name}
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    assert rates == [0.05, 0.025]


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_learning_rate_schedules_are_followed(kind, tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()),
        tmp_path,
        max_steps=4,
        learning_rate=0.01,
        lr_scheduler_type=kind,
        warmup_steps=1,
    )
    trainer.train()
    rates = [log["learning_rate"] for log in trainer.state.log_history if "loss" in log]
    after = {
        "linear": [0.01, 0.01 * 2 / 3, 0.01 / 3],
        "cosine": [0.01 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)],
        "constant_with_warmup": [0.01] * 3,
    }
    assert rates == pytest.approx([0.0, *after[kind]])


def test_every_form_of_the_data_gives_the_same_training(tmp_path):
    class MapStyle(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return plain_rows(4)[index]

    losses = []
    for rows in (plain_rows(4), datasets.Dataset.from_list(plain_rows(4)), MapStyle()):
        trainer = trainer_for(with_lora(tiny_model()), tmp_path, rows, max_steps=2)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1] == losses[2]


def test_loader_workers_give_the_same_training(tmp_path):
    losses = []
    for workers in (0, 1):
        trainer = trainer_for(
            with_lora(tiny_model()), tmp_path, max_steps=2, dataloader_num_workers=workers
        )
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == losses[1]


def test_without_a_peft_config_the_whole_model_trains_and_with_one_only_the_adapter(tmp_path):
    whole = trainer_for(tiny_model(), tmp_path)
    assert all(parameter.requires_grad for parameter in whole.model.parameters())
    adapted = trainer_for(
        tiny_model(), tmp_path, peft_config=LoraConfig(r=2, target_modules="all-linear")
    )
    assert isinstance(adapted.model, PeftModel)
    trained = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)


def dropouts_of(model):
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Dropout)]


def test_the_base_models_dropout_is_off_and_loras_is_kept(tmp_path):
    def model(kind):
        base = tiny_model(kind)
        for _, module in dropouts_of(base):
            module.p = 0.5
        for module in base.modules():
            for rate in ("attention_dropout", "residual_dropout"):
                if hasattr(module, rate):
                    setattr(module, rate, 0.5)
        return base

    for kind in ("gpt2", "llama", "starcoder2"):
        for disabled in (True, False):
            trainer = trainer_for(model(kind), tmp_path, disable_dropout=disabled)
            pairs = list(trainer.train_dataset)
            entries, _ = trainer.get_batch_samples(iter([{"pairs": pairs}]), 1, trainer.args.device)
            first, second = (
                float(trainer.training_step(trainer.model, entries[0])) for _ in range(2)
            )
            assert (first == second) is disabled, kind
    lora = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.25, fan_in_fan_out=True)
    wrapped_by_us = trainer_for(model("gpt2"), tmp_path, peft_config=lora).model
    wrapped_before = trainer_for(with_lora(model("gpt2"), lora_dropout=0.25), tmp_path).model
    for adapted in (wrapped_by_us, wrapped_before):
        rates = {("lora_dropout" in name, module.p) for name, module in dropouts_of(adapted)}
        assert rates == {(False, 0.0), (True, 0.25)}


def test_a_model_and_its_tokenizer_load_by_the_name_of_a_folder(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    trainer = ORPOTrainer(
        model=str(tmp_path / "base"),
        args=quiet_config(tmp_path / "run", max_steps=1),
        train_dataset=plain_rows(2),
    )
    assert trainer.processing_class.get_vocab() == TOKENIZER.get_vocab()
    trainer.train()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = ORPOTrainer(model=loaded, args=trainer.args, train_dataset=plain_rows(2))
    assert trainer.processing_class.get_vocab() == TOKENIZER.get_vocab()


def test_autocast_trains_close_to_fp32_in_lora_and_in_full(tmp_path):
    for make in (lambda: with_lora(tiny_model()), tiny_model):
        losses = []
        for bf16 in (False, True):
            trainer = trainer_for(make(), tmp_path, max_steps=3, learning_rate=0.01, bf16=bf16)
            trainer.train()
            assert trainer.head.is_fused
            losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        assert losses[0] != losses[1]
        # bf16 has 8 bits; what it rounds are hidden states, the sums are fp32.
        assert losses[1] == pytest.approx(losses[0], rel=2e-2)


@pytest.mark.parametrize("make", [list, datasets.Dataset.from_list], ids=["list", "dataset"])
def test_pairs_of_similar_length_are_grouped_in_an_order_of_seed_and_epoch(make, tmp_path):
    orders = []
    for seed in (3, 3, 8):
        trainer = trainer_for(
            with_lora(tiny_model()), tmp_path, make(plain_rows(24)), seed=seed,
            per_device_train_batch_size=2, train_sampling_strategy="group_by_length",
        )  # fmt: skip
        order = list(trainer._get_train_sampler())
        trainer.state.epoch = 1.0
        orders.append((order, list(trainer._get_train_sampler())))
        for epoch in orders[-1]:
            assert sorted(epoch) == list(range(24))
            lengths = [trainer.train_dataset[row]["length"] for row in epoch]
            assert lengths[0] == max(lengths)  # memory that is too small is found out at once
            for start in range(0, 24, 6):  # three batches each
                group = lengths[start + 1 : start + 6]
                assert group == sorted(group, reverse=True)
    assert orders[0] == orders[1]
    assert len({tuple(order) for pair in orders[1:] for order in pair}) == 4


def test_a_run_grouped_by_length_passes_every_pair(tmp_path):
    trainer = trainer_for(
        with_lora(tiny_model()), tmp_path, plain_rows(9), per_device_train_batch_size=3,
        num_train_epochs=1, train_sampling_strategy="group_by_length",
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step == 3


def test_a_trainer_that_nobody_uses_is_gone_at_once_with_its_model(tmp_path):
    """In a notebook the next one needs the memory; a cycle would wait for the collector."""
    gc.collect()
    gc.disable()
    try:
        trainer = trainer_for(
            with_lora(tiny_model()), tmp_path, max_steps=1, eval_dataset=plain_rows(2)
        )
        trainer.train()
        trainer.evaluate()
        model = weakref.ref(trainer.model)
        del trainer
        assert model() is None
    finally:
        gc.enable()
