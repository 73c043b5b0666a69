"""The fused ORPO loss in a loop of your own: plain PyTorch, and a stock transformers Trainer.

Only `lite_orpo_kernels` is imported, not the trainer around it. The model's backbone gives
hidden states; the loss takes them and the LM head, and no logits are ever held.

    python examples/fused_loss_in_your_loop.py [--steps 20]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from lite_orpo_kernels import fused_orpo_loss

HERE = Path(__file__).parent
IGNORED = -100
LEARNING_RATE = 5e-4


def load_pairs(tokenizer: Any, count: int) -> list[dict[str, list[int]]]:
    """Token ids of the first pairs of the demo data."""
    pairs = []
    with (HERE / "demo_data" / "train.jsonl").open(encoding="utf-8") as stream:
        for line in list(stream)[:count]:
            row = json.loads(line)
            ids = {}
            prompt = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=False
            )
            for side in ("chosen", "rejected"):
                messages = row["prompt"] + row[side]
                ids[side] = tokenizer.apply_chat_template(messages, return_dict=False)
            pairs.append({"prompt": prompt, **ids})
    return pairs


def collate(pairs: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Chosen sequences, then rejected ones; position t is marked by what it predicts."""
    sequences, targets, completions, nll = [], [], [], []
    for side in ("chosen", "rejected"):
        for number, pair in enumerate(pairs):
            ids, prompt = torch.tensor(pair[side]), len(pair["prompt"])
            in_completion = torch.arange(1, len(ids)) >= prompt
            is_chosen = side == "chosen"
            sequences.append(ids)
            # A rejected prompt is in neither term: leave it out, and the head never sees it.
            targets.append(ids[1:].where(in_completion | is_chosen, torch.tensor(IGNORED)))
            completion = torch.tensor(2 * number + (not is_chosen))
            completions.append(completion.where(in_completion, torch.tensor(-1)))
            nll.append(torch.full((len(ids) - 1,), is_chosen))
    return {
        "input_ids": pad_sequence(sequences, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(s) for s in sequences], batch_first=True),
        "targets": pad_sequence(targets, batch_first=True, padding_value=IGNORED),
        "completion_ids": pad_sequence(completions, batch_first=True, padding_value=-1),
        "nll_mask": pad_sequence(nll, batch_first=True, padding_value=False),
    }


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


def train_in_plain_pytorch(model: Any, pairs: list[Any], steps: int) -> list[float]:
    """A loop with nothing but torch in it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for step in range(steps):
        start = 4 * step % len(pairs)
        loss = orpo_loss(model, collate(pairs[start : start + 4]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


class FusedLossTrainer(Trainer):
    """A stock Trainer; only where the loss comes from is said."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Take the fused loss instead of the model's own."""
        loss = orpo_loss(model, inputs)
        return (loss, {}) if return_outputs else loss


def train_in_transformers(model: Any, pairs: list[Any], steps: int, folder: str) -> list[float]:
    """The same loss in transformers' own loop."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=LEARNING_RATE,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = FusedLossTrainer(
        model=model, args=arguments, train_dataset=pairs, data_collator=collate
    )
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main() -> None:
    """Run both loops on the demo model and print where the loss went."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output-dir", default="runs/fused_loss_in_your_loop")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(HERE / "demo_model")
    pairs = load_pairs(tokenizer, 4 * arguments.steps)
    for name, loop in (
        ("plain PyTorch", lambda m: train_in_plain_pytorch(m, pairs, arguments.steps)),
        (
            "transformers Trainer",
            lambda m: train_in_transformers(m, pairs, arguments.steps, arguments.output_dir),
        ),
    ):
        model = AutoModelForCausalLM.from_pretrained(HERE / "demo_model", dtype=torch.float32)
        losses = loop(model)
        few = max(1, len(losses) // 4)
        first, last = sum(losses[:few]) / few, sum(losses[-few:]) / few
        print(f"{name}: loss {first:.3f} -> {last:.3f} in {len(losses)} steps")


if __name__ == "__main__":
    main()
