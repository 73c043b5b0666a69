"""Another loss on the same head: SimPO in an Accelerate loop, alone or on several processes.

`fused_linear_logprobs` gives log-probabilities without the logits; a preference loss on top of
it is ten lines. SimPO (arXiv 2405.14734) needs no reference model.

    python examples/simpo_in_accelerate.py [--steps 20]
    accelerate launch examples/simpo_in_accelerate.py                  # as you configured it
    ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 examples/simpo_in_accelerate.py
"""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pairs_for_loops import DEMO_MODEL, IGNORED, collate, fall_of, load_pairs
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

from lite_orpo_kernels import fused_linear_logprobs

PAIRS_PER_STEP = 4
LEARNING_RATE = 5e-4


class SimPO(nn.Module):
    """A causal LM whose forward returns SimPO's loss on its batch."""

    # The loss is inside the forward because what accelerate wraps around a model works there:
    # FSDP gathers weights and autocast casts only while it runs, and DDP, where it looks for
    # unused parameters, looks from its output. A head that is read outside would be missed.

    def __init__(self, causal_lm: Any, beta: float = 2.0, gamma: float = 1.0) -> None:
        super().__init__()
        self.causal_lm, self.beta, self.gamma = causal_lm, beta, gamma

    def forward(self, input_ids: Tensor, attention_mask: Tensor, targets: Tensor) -> Tensor:
        """Equation 6: -log sigmoid(beta * (mean log p chosen - mean log p rejected) - gamma)."""
        backbone = self.causal_lm.get_decoder()
        hidden = backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        head = self.causal_lm.get_output_embeddings()
        logps = fused_linear_logprobs(hidden[:, :-1], head.weight, targets)
        # Rows that are ignored come back as 0, so the sum is over the completion.
        mean_logps = logps.sum(1) / (targets != IGNORED).sum(1)
        chosen, rejected = mean_logps.chunk(2)
        return -F.logsigmoid(self.beta * (chosen - rejected) - self.gamma).mean()


def collate_completions(pairs: list[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Chosen sequences, then rejected ones; SimPO scores completions and no prompt."""
    batch = collate(pairs)
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "targets": batch["targets"].where(batch["completion_ids"] >= 0, IGNORED),
    }


def train(accelerator: Accelerator, causal_lm: Any, pairs: list[Any]) -> tuple[nn.Module, Any]:
    """One pass over the pairs; returns the wrapped model and each step's loss over all ranks."""
    model = SimPO(causal_lm).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    loader = DataLoader(pairs, batch_size=PAIRS_PER_STEP, collate_fn=collate_completions)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        # A mean over pairs, with as many pairs on every rank: DDP's mean over ranks is exact.
        loss = model(**batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
    return model, losses


def are_weights_equal(accelerator: Accelerator, model: nn.Module) -> bool:
    """Whether all ranks ended with the same weights, which have seen different pairs."""
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    of_all_ranks = accelerator.gather(flat[None])
    return bool((of_all_ranks == of_all_ranks[:1]).all())


def main() -> None:
    """Train the demo model for a few steps and print where the loss went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    accelerator = Accelerator()
    causal_lm = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)
    count = PAIRS_PER_STEP * steps * accelerator.num_processes
    pairs = load_pairs(AutoTokenizer.from_pretrained(DEMO_MODEL), count)
    model, losses = train(accelerator, causal_lm, pairs)
    is_equal = are_weights_equal(accelerator, model)
    accelerator.print(f"SimPO in accelerate: {fall_of(losses)}")
    accelerator.print(f"weights equal on all {accelerator.num_processes} processes: {is_equal}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
