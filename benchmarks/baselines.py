"""What the benchmarks compare with, called the way its own documentation calls it.

Every head takes (hidden [M, D], weight [V, D], targets [M]) and returns log-probabilities [M];
imports are inside, so that a worker's memory holds only what it measures.

Legend: M scored rows, D hidden size, V vocabulary, n pairs in a step, L the longest sequence.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Head = Callable[[Tensor, Tensor, Tensor], Tensor]


class Peer(NamedTuple):
    """A way to get log-probabilities from hidden states and a head."""

    title: str
    head: Head


def eager(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The expression that everybody writes; the softmax is fp32, as transformers has it."""
    logps = F.log_softmax(F.linear(hidden, weight), dim=-1, dtype=torch.float32)
    return logps.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def lite_orpo(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Ours, as `ORPOTrainer` calls it."""
    from lite_orpo_kernels import fused_linear_logprobs

    return fused_linear_logprobs(hidden, weight, targets)


def trl_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """TRL's chunked kernel with its trainers' chunk size and no extra outputs."""
    from trl.kernels import ChunkedLogProbFunction

    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, ())[0]


def torch_chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """PyTorch's chunked linear_cross_entropy with its automatic options."""
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(
        hidden, weight, targets, reduction="none", ignore_index=-100, options=options
    )


PEERS = {
    "eager": Peer("eager: linear, log_softmax, gather", eager),
    "lite_orpo": Peer("lite-orpo fused_linear_logprobs", lite_orpo),
    "trl_chunked": Peer("TRL ChunkedLogProbFunction", trl_chunked),
    "torch_chunked": Peer("torch F.linear_cross_entropy", torch_chunked),
}


class Training(NamedTuple):
    """A trainer that is ready for its first step."""

    forward_and_backward: Callable[[], float]
    """Leaves gradients on the model and returns the loss."""
    input_ids: Tensor
    """[2n, L], what its trunk sees."""
    attention_mask: Tensor


def lite_orpo_training(
    model: Any, tokenizer: Any, pairs: list[dict[str, str]], beta: float, folder: str
) -> Training:
    """Our trainer's own step on one batch."""
    from lite_orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(
            per_device_train_batch_size=len(pairs),
            beta=beta,
            # The layout of TRL's rows, in one batch: what differs is the loss.
            prefix_sharing="off",
            max_tokens_per_row=2**20,
            **_common_settings(folder),
        ),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    if not trainer.head.is_fused:
        raise RuntimeError(f"the fused head is not in use: {trainer.head.reason}")
    batches = iter(trainer.get_train_dataloader())
    inputs = trainer.get_batch_samples(batches, 1, trainer.args.device)[0][-1]
    rows = inputs["step"].rows[0]

    def forward_and_backward() -> float:
        return float(trainer.training_step(trainer.model, inputs))

    return Training(forward_and_backward, rows.inputs["input_ids"], rows.inputs["attention_mask"])


def trl_training(
    model: Any, tokenizer: Any, pairs: list[dict[str, str]], beta: float, folder: str
) -> Training:
    """TRL's ORPOTrainer on one batch: its compute_loss and the backward pass."""
    import datasets
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    datasets.disable_progress_bars()
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(
            per_device_train_batch_size=len(pairs),
            beta=beta,
            gradient_checkpointing=False,
            bf16=False,
            remove_unused_columns=False,
            **_common_settings(folder),
        ),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    joined = trainer.concatenated_inputs(batch, padding_value=trainer.padding_value)

    def forward_and_backward() -> float:
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        trainer.accelerator.backward(loss)
        return float(loss.detach())

    return Training(
        forward_and_backward,
        joined["concatenated_input_ids"],
        joined["concatenated_attention_mask"],
    )


class StepSetup(NamedTuple):
    """What a trainer is made from, to take steps of n pairs."""

    model: Any
    tokenizer: Any
    pairs: list[dict[str, str]]
    pairs_per_step: int
    beta: float
    max_length: int
    device: str
    is_bf16: bool
    folder: str


class StepTrainer(NamedTuple):
    """A trainer that takes steps on any of its pairs."""

    model: Any
    """What trains, on its device."""
    examples: list[Any]
    """The pairs in order, tokenised as this trainer keeps them."""
    forward_and_backward: Callable[[list[Any]], Tensor]
    """From n examples: collates them, leaves gradients on the model, returns the loss."""


def lite_orpo_steps(setup: StepSetup, **row_settings: Any) -> StepTrainer:
    """Our trainer with some settings of its rows: its collator, its plan, its training_step."""
    from lite_orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(
        model=setup.model,
        args=ORPOConfig(**row_settings, **_step_settings(setup)),
        train_dataset=setup.pairs,
        processing_class=setup.tokenizer,
    )
    if not trainer.head.is_fused:
        raise RuntimeError(f"the fused head is not in use: {trainer.head.reason}")
    trainer.accelerator.prepare_model(trainer.model)  # as Trainer does before its first step

    def forward_and_backward(examples: list[Any]) -> Tensor:
        batches = iter([trainer.data_collator(examples)])
        inputs = trainer.get_batch_samples(batches, 1, trainer.args.device)[0][-1]
        return trainer.training_step(trainer.model, inputs)

    return StepTrainer(trainer.model, list(trainer.train_dataset), forward_and_backward)


def trl_steps(setup: StepSetup) -> StepTrainer:
    """TRL's ORPOTrainer: its collator, its compute_loss and the backward pass."""
    import datasets
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    datasets.disable_progress_bars()
    trainer = ORPOTrainer(
        model=setup.model,
        args=ORPOConfig(remove_unused_columns=False, **_step_settings(setup)),
        train_dataset=datasets.Dataset.from_list(setup.pairs),
        processing_class=setup.tokenizer,
    )
    trainer.accelerator.prepare_model(trainer.model)

    def forward_and_backward(examples: list[Any]) -> Tensor:
        batch = trainer._prepare_inputs(trainer.data_collator(examples))
        trainer.model.train()
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, batch)
        trainer.accelerator.backward(loss)
        return loss.detach()

    return StepTrainer(trainer.model, list(trainer.train_dataset), forward_and_backward)


def full_logits_steps(setup: StepSetup) -> StepTrainer:
    """A plain loop with TRL's loss, where TRL is not installed; it makes none of TRL's metrics."""
    model = setup.model.to(setup.device)

    def tokenised(pair: dict[str, str]) -> dict[str, list[int]]:
        ids = {column: setup.tokenizer.encode(text) for column, text in pair.items()}
        ids["prompt"].insert(0, setup.tokenizer.bos_token_id)
        for column in ("chosen", "rejected"):
            ids[column].append(setup.tokenizer.eos_token_id)
        return ids

    def forward_and_backward(examples: list[Any]) -> Tensor:
        sequences = [e["prompt"] + e[c] for c in ("chosen", "rejected") for e in examples]
        longest = max(map(len, sequences))
        input_ids = torch.full((len(sequences), longest), setup.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full_like(input_ids, -100)
        for row, ids in enumerate(sequences):
            start = len(examples[row % len(examples)]["prompt"])
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
            labels[row, start : len(ids)] = input_ids[row, start : len(ids)]
        ids, mask, targets = (t.to(setup.device) for t in (input_ids, attention_mask, labels))
        model.train()
        with torch.autocast(setup.device, torch.bfloat16, enabled=setup.is_bf16):
            logits = model(ids, attention_mask=mask, use_cache=False).logits
            # accelerate hands a trainer fp32 outputs of a model under autocast.
            loss = full_logits_orpo_loss(logits.float(), ids, mask, targets, setup.beta)
        loss.backward()
        return loss.detach()

    return StepTrainer(model, [tokenised(pair) for pair in setup.pairs], forward_and_backward)


def full_logits_orpo_loss(
    logits: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, beta: float
) -> Tensor:
    """TRL's ORPO loss: mean nll of all chosen tokens minus beta * mean log sigmoid log odds ratio.

    Args:
        logits: [2n, L, V], n chosen sequences, then n rejected ones.
        input_ids: [2n, L] int64.
        attention_mask: [2n, L], 0 on padding.
        labels: [2n, L] int64, the completions' tokens, -100 elsewhere.
        beta: weight of the odds-ratio term.
    """
    pairs = len(logits) // 2
    next_ids = torch.where(attention_mask == 1, input_ids, -100)[:pairs, 1:]
    nll = F.cross_entropy(logits[:pairs, :-1].flatten(0, 1), next_ids.flatten())
    scored, targets = logits[:, :-1], labels[:, 1:]
    is_scored = targets != -100
    chosen_logits = scored.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    logps = chosen_logits - torch.stack([torch.logsumexp(row, dim=-1) for row in scored])
    means = (logps * is_scored).sum(1) / is_scored.sum(1)
    chosen, rejected = means[:pairs], means[pairs:]
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return nll - beta * F.logsigmoid(log_odds).mean()


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, by whichever form does not cancel, as in TRL."""
    return torch.where(
        x < -0.6931471805599453, torch.log1p(-torch.exp(x)), torch.log(-torch.expm1(x))
    )


def _step_settings(setup: StepSetup) -> dict[str, Any]:
    return {
        **_common_settings(setup.folder, setup.max_length, use_cpu=setup.device == "cpu"),
        "per_device_train_batch_size": setup.pairs_per_step,
        "beta": setup.beta,
        "gradient_checkpointing": False,  # a model that checkpoints already goes on doing so
        "bf16": setup.is_bf16,
        "fp16": False,
    }


def _common_settings(folder: str, max_length: int = 512, use_cpu: bool = True) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": use_cpu,
        "max_length": max_length,
        "report_to": "none",
        "disable_tqdm": True,
    }


TRAINERS = {"lite-orpo": lite_orpo_training, "TRL": trl_training}
