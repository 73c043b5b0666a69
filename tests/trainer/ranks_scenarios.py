"""Small runs that must not depend on how many ranks they are spread over.

`run_all` is called by the tests in one process, and by this file as a script in each rank of
`torchrun`. Every scenario says how many pairs a step has over all ranks; the batch per
rank follows from the number of ranks.
"""

import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE), str(HERE.parent / "data")]

import torch  # noqa: E402
from tiny_models import (  # noqa: E402
    GradientRecorder,
    plain_rows,
    tiny_model,
    trainer_for,
    with_lora,
)


class Scenario(NamedTuple):
    pairs: int
    batch: int
    """Pairs of a batch over all ranks."""
    accumulation: int = 1
    full: bool = False
    settings: dict[str, Any] = {}


SCENARIOS = {
    "even": Scenario(pairs=4, batch=4),
    "accumulated": Scenario(pairs=8, batch=2, accumulation=4),
    # Of the last step's repeats, one rank has nothing but.
    "one_pair_left": Scenario(pairs=5, batch=4),
    "one_pair_left_full": Scenario(pairs=5, batch=4, full=True),
    "three_pairs_left": Scenario(pairs=7, batch=4, accumulation=2),
    "fewer_pairs_than_ranks": Scenario(pairs=1, batch=2),
    "many_rows": Scenario(pairs=7, batch=4, accumulation=2, settings={"max_tokens_per_row": 80}),
    "padded": Scenario(pairs=7, batch=4, accumulation=2, settings={"prefix_sharing": "off"}),
    "embedding_on_host": Scenario(pairs=5, batch=4, settings={"offload_embedding": True}),
    "packed_for_sure": Scenario(pairs=7, batch=4, settings={"prefix_sharing": "on"}),
    "dpo": Scenario(pairs=7, batch=4, settings={"loss_type": "dpo"}),
    "sft_one_pair_left": Scenario(pairs=5, batch=4, settings={"loss_type": "sft"}),
    "checkpointed": Scenario(
        pairs=5, batch=2, accumulation=2, settings={"gradient_checkpointing": True}
    ),
}


def model_for(scenario: Scenario) -> Any:
    model = tiny_model(tie_word_embeddings=False)
    return model if scenario.full else with_lora(model)


def run(scenario: Scenario, folder: Path, ranks: int) -> dict[str, Any]:
    """One epoch without moving the weights: gradients and logged losses of each step."""
    recorder = GradientRecorder()
    trainer = trainer_for(
        model_for(scenario),
        folder,
        plain_rows(scenario.pairs),
        callbacks=[recorder],
        per_device_train_batch_size=scenario.batch // ranks,
        gradient_accumulation_steps=scenario.accumulation,
        num_train_epochs=1,
        learning_rate=0.0,
        max_grad_norm=0.0,
        optim="sgd",
        **scenario.settings,
    )
    assert trainer.args.world_size == ranks
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return {"gradients": recorder.steps, "logs": logs}


def sharded_gradients(folder: Path, ranks: int) -> dict[str, Any]:
    """One step of six pairs over a model sharded by FSDP 2, where ranks differ in their rows.

    Accelerate starts FSDP on GPUs only, so torch's own call shards the trainer's model here.
    """
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    trainer = trainer_for(
        with_lora(tiny_model()), folder, plain_rows(6), max_tokens_per_row=2, prefix_sharing="on"
    )
    pairs = list(trainer.train_dataset)
    if ranks > 1:
        mine = (slice(0, 4), slice(4, 6))
        pairs = pairs[mine[distributed.get_rank()]]
        for layer in trainer.model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(trainer.model)
        trainer.equal_rows = True
    entries, _ = trainer.get_batch_samples(iter([{"pairs": pairs}]), 1, trainer.args.device)
    rows = len(entries[-1]["step"].rows)
    loss = float(trainer.training_step(trainer.model, entries[-1]))
    gradients = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad
            gradients[name] = gradient.full_tensor() if ranks > 1 else gradient.clone()
    return {"rows": rows, "loss": loss, "gradients": gradients}


def decisions(folder: Path, ranks: int) -> dict[str, Any]:
    """What this rank decides where the last rank's model cannot share prefixes."""
    from lite_orpo import row_choice
    from lite_orpo.errors import ModelError
    from lite_orpo.model.prefix_sharing import PrefixSharing

    own = row_choice._decide
    if ranks > 1 and torch.distributed.get_rank() == ranks - 1:
        row_choice._decide = lambda trainer: PrefixSharing(False, "this one cannot")
    try:
        trainer = trainer_for(with_lora(tiny_model()), folder)
        found = {"auto": trainer.rows_description}
        try:
            trainer_for(with_lora(tiny_model()), folder, prefix_sharing="on")
            found["on"] = "no error"
        except ModelError as error:
            found["on"] = str(error)
    finally:
        row_choice._decide = own
    return found


def evaluate(folder: Path, batch: int) -> dict[str, float]:
    """The metrics of seven held-out pairs."""
    trainer = trainer_for(
        with_lora(tiny_model()),
        folder,
        eval_dataset=plain_rows(7),
        per_device_eval_batch_size=batch,
    )
    metrics = trainer.evaluate()
    return {k: v for k, v in metrics.items() if "time" not in k and "per_second" not in k}


def resumed_weights(folder: Path, ranks: int) -> dict[str, Any]:
    """Seven pairs, two a step: the weights after an epoch, straight and resumed after step 2."""
    weights = {}
    for name in ("straight", "resumed"):
        torch.manual_seed(0)
        trainer = trainer_for(
            with_lora(tiny_model()),
            folder,
            plain_rows(7),
            per_device_train_batch_size=2 // ranks,
            num_train_epochs=1,
            learning_rate=0.01,
            save_strategy="steps",
            save_steps=2,
        )
        checkpoint = str(folder / "checkpoint-2") if name == "resumed" else None
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 4
        state = trainer.accelerator.unwrap_model(trainer.model).state_dict()
        weights[name] = {key: value.clone() for key, value in state.items() if "lora" in key}
    return weights


def files_of_model_alone(folder: Path, ranks: int) -> list[str]:
    """What a checkpoint has in it that is saved without the training state."""
    trainer = trainer_for(
        with_lora(tiny_model()), folder, max_steps=1, per_device_train_batch_size=2 // ranks,
        save_strategy="steps", save_steps=1, save_only_model=True,
    )  # fmt: skip
    trainer.train()
    return sorted(path.name for path in (folder / "checkpoint-1").iterdir())


def run_all(folder: Path, ranks: int) -> dict[str, Any]:
    """Every scenario; the same keys in one process and in several."""
    results: dict[str, Any] = {
        name: run(scenario, folder / name, ranks) for name, scenario in SCENARIOS.items()
    }
    results["sharded"] = sharded_gradients(folder / "sharded", ranks)
    results["decisions"] = decisions(folder / "decisions", ranks)
    results["evaluation"] = evaluate(folder / "evaluation", 4 // ranks)
    results["model_alone"] = files_of_model_alone(folder / "model_alone", ranks)
    results["resume"] = resumed_weights(folder / "resume", ranks)
    return results


if __name__ == "__main__":
    import os

    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    world = int(os.environ["WORLD_SIZE"])
    torch.save(run_all(out, world), out / f"rank{os.environ['RANK']}.pt")
    torch.distributed.destroy_process_group()
