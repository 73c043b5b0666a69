"""What the benchmarks compare with, called the way its own documentation calls it.

Every head takes (hidden [M, D], weight [V, D], targets [M]) and returns log-probabilities [M];
imports are inside, so that a worker's memory holds only what it measures.

Legend: M scored rows, D hidden size, V vocabulary.
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
            per_device_train_batch_size=len(pairs), beta=beta, **_common_settings(folder)
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

    return Training(forward_and_backward, rows.input_ids, rows.attention_mask)


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


def _common_settings(folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "use_cpu": True,
        "max_length": 512,
        "report_to": "none",
        "disable_tqdm": True,
    }


TRAINERS = {"lite-orpo": lite_orpo_training, "TRL": trl_training}
