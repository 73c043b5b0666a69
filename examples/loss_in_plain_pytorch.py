"""The fused ORPO loss in a plain PyTorch loop.

Only `lite_orpo_kernels` is imported, not the trainer around it. The model's backbone gives
hidden states; the loss takes them and the LM head, and no logits are ever held.

    python examples/loss_in_plain_pytorch.py [--steps 20]
"""

import argparse
from typing import Any

import torch
from pairs_for_loops import DEMO_MODEL, collate, fall_of, load_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

from lite_orpo_kernels import fused_orpo_loss

PAIRS_PER_STEP = 4
LEARNING_RATE = 5e-4


def orpo_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The whole integration: hidden states of all but the last position, and the head."""
    backbone = model.get_decoder()
    output = backbone(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    return fused_orpo_loss(
        output.last_hidden_state[:, :-1].flatten(0, 1),
        model.get_output_embeddings().weight,
        batch["targets"].flatten(),
        batch["completion_ids"].flatten(),
        batch["nll_mask"].flatten(),
        pair_count=len(batch["input_ids"]) // 2,
        alpha=0.1,
    ).loss


def train(model: Any, pairs: list[dict[str, list[int]]], steps: int) -> list[float]:
    """A loop with nothing but torch in it; returns the loss of every step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        start = PAIRS_PER_STEP * step % len(pairs)
        batch = collate(pairs[start : start + PAIRS_PER_STEP])
        loss = orpo_loss(model, {name: part.to(model.device) for name, part in batch.items()})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train the demo model for a few steps and print where the loss went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).to(device)
    pairs = load_pairs(AutoTokenizer.from_pretrained(DEMO_MODEL), PAIRS_PER_STEP * steps)
    print(f"plain PyTorch: {fall_of(train(model, pairs, steps))}")


if __name__ == "__main__":
    main()
