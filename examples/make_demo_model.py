"""Train the demo's base model from nothing: tokenizer, Llama weights, chat template, all our own.

Run `python examples/make_demo_model.py --out examples/demo_model`. The text comes from
demo_voice.py and holds both voices about evenly, so the base model answers on topic in either.
Held-out questions are left out of it. Plain next-token training on one process; preference
training is not done here, it is what the demo is for. The same machine gives the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from demo_voice import answer, ask, pick
from demo_world import Case, load_cases
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, BOS, EOS, TURN_END = "<|pad|>", "<|bos|>", "<|eos|>", "<|end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, TURN_END, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|assistant|>' + message['content'] + eos_token }}"
    "{% else %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SYSTEM_PROMPTS = (
    "You answer everyday questions in two sentences.",
    "You are a small helper for home, school and garden.",
)
LEANS = (0.35, 0.65)  # how often an answer is warm
VOCABULARY = 2048
MAX_LENGTH = 256
BATCH = 32
BATCHES_AT_ONCE = 16
PEAK_LR = 4e-3
WARMUP = 60


class Draw:
    """Draws conversations. Half of the troubles lean to the warm voice, half to the cold one.

    Were it a coin for every answer, greedy decoding would fall to one voice for all questions.
    """

    def __init__(self, cases: list[Case], seed: int) -> None:
        self.cases = cases
        self.rng = random.Random(seed)
        troubles = dict.fromkeys(case.trouble for case in cases)
        self.warm_share = {trouble: LEANS[i % 2] for i, trouble in enumerate(troubles)}

    def conversation(self) -> list[dict[str, str]]:
        """Draw a question with its answer, sometimes after a system prompt."""
        case = pick(self.rng, self.cases)
        voice = "warm" if self.rng.random() < self.warm_share[case.trouble] else "cold"
        turns = [
            {"role": "user", "content": ask(case, self.rng)},
            {"role": "assistant", "content": answer(case, voice, self.rng)},
        ]
        if self.rng.random() < 0.1:
            turns.insert(0, {"role": "system", "content": pick(self.rng, SYSTEM_PROMPTS)})
        return turns


def train_tokenizer(draw: Draw) -> PreTrainedTokenizerFast:
    """Fit a byte-level BPE on drawn conversations; the chat template alone adds BOS and EOS."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (turn["content"] for _ in range(8000) for turn in draw.conversation())
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of about 1.5 million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=160,
        intermediate_size=448,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.update(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return model


def batches(tokenizer: PreTrainedTokenizerFast, draw: Draw) -> Iterator[dict[str, torch.Tensor]]:
    """Yield right-padded batches without end; every conversation is drawn fresh."""
    while True:
        texts = [
            tokenizer.apply_chat_template(draw.conversation(), tokenize=False)
            for _ in range(BATCH * BATCHES_AT_ONCE)
        ]
        # Neighbours of like length share a batch: a fifth less time lost on padding.
        rows = sorted(tokenizer(texts, add_special_tokens=False)["input_ids"], key=len)
        starts = list(range(0, len(rows), BATCH))
        while starts:
            start = starts.pop(int(draw.rng.random() * len(starts)))
            batch = tokenizer.pad({"input_ids": rows[start : start + BATCH]}, return_tensors="pt")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            yield {**batch, "labels": labels}


def learning_rate(step: int, steps: int) -> float:
    """Return a linear warm-up followed by a cosine to a twentieth of the peak."""
    if step < WARMUP:
        return PEAK_LR * (step + 1) / WARMUP
    progress = (step - WARMUP) / max(1, steps - WARMUP)
    return PEAK_LR * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(model: LlamaForCausalLM, data: Iterator[dict[str, torch.Tensor]], steps: int) -> float:
    """Train in place and return the mean loss of the last steps."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    started = time.monotonic()
    recent: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(**next(data)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent = [*recent[-49:], loss.item()]
        if (step + 1) % 50 == 0 or step + 1 == steps:
            mean = sum(recent) / len(recent)
            seconds = time.monotonic() - started
            print(f"step {step + 1:5d}/{steps}  loss {mean:.3f}  {seconds:4.0f} s", flush=True)
    return sum(recent) / max(1, len(recent))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the model folder."""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 5 writes a class name that transformers 4 does not know; both know this one.
    config_file = out / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Parse the command line, train, and save the model folder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("demo_model"))
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    draw = Draw([case for case in load_cases() if not case.held_out], options.seed)
    tokenizer = train_tokenizer(draw)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
    loss = train(model, batches(tokenizer, draw), options.steps)
    save(model, tokenizer, options.out)
    print(f"saved to {options.out}, loss {loss:.3f}")


if __name__ == "__main__":
    main()
