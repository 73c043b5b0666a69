"""TRL's own ORPOTrainer with its loss swapped: same loss, gradients and metrics, no logits.

Data handling, collation, metrics, evaluation and the training loop stay TRL's; one method of its
trainer is overridden.

    python examples/loss_in_trl.py [--steps 20]
"""

import argparse
import functools
from typing import Any

import datasets
import pairs_for_loops as demo
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PrinterCallback
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from lite_orpo_kernels import fused_linear_logprobs

PAIRS_PER_STEP = 4
LARGE_VOCABULARY = 65_536  # the demo's 2,048 tokens are too few for a figure that means anything
# Models with these change what the head gives; `fused_linear_logprobs` can (logit_scale, softcap).
LOGIT_SETTINGS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class FusedLossORPOTrainer(ORPOTrainer):
    """TRL's ORPOTrainer; log-probabilities come from hidden states and the head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.is_encoder_decoder or self.aux_loss_enabled:
            raise ValueError("encoder-decoders and routers' auxiliary losses are not handled here")
        teach_to_score(self.model)

    def concatenated_forward(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return what TRL's method returns, but for the logits: their mean at each position."""
        both = self.concatenated_inputs(batch, False, self.padding_value, self.accelerator.device)
        ids, attention_mask = both["concatenated_input_ids"], both["concatenated_attention_mask"]
        pairs = len(batch["chosen_labels"])
        # TRL has two masks: its labels leave the prompt out and are for the odds; its NLL is over
        # all that attention sees of the chosen side, prompt included.
        in_completion = both["concatenated_labels"][:, 1:] != demo.IGNORED
        in_nll = attention_mask[:, 1:] == 1
        in_nll[pairs:] = False
        targets = ids[:, 1:].where(in_completion | in_nll, demo.IGNORED)
        logps, mean_logits = model(ids, attention_mask=attention_mask, targets=targets)
        nll = -(logps * in_nll).sum() / in_nll.sum()
        # TRL's average_log_prob=True. The rest, beta included, is in its odds_ratio_loss.
        mean_logps = (logps * in_completion).sum(-1) / in_completion.sum(-1)
        return *mean_logps.split(pairs), *mean_logits.split(pairs), nll


def teach_to_score(model: Any) -> None:
    """Let the causal LM in `model` return log-probabilities instead of logits, given targets."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, own_forward = causal_lm.get_output_embeddings(), causal_lm.forward
    settings = causal_lm.config.get_text_config().to_dict()
    changes = [name for name in LOGIT_SETTINGS if settings.get(name) not in (None, 1.0)]
    # A head with an adapter on it is no nn.Linear: its weight alone would be silently wrong.
    if type(head) is not nn.Linear or changes:
        raise ValueError(f"logits are not one plain product: {type(head).__name__} {changes}")

    # A new forward, since DDP, FSDP, autocast and PEFT take care of a head that is used inside.
    @functools.wraps(own_forward)
    def forward(*ids: Any, targets: Tensor | None = None, **kwargs: Any) -> Any:
        if targets is None:
            return own_forward(*ids, **kwargs)
        inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask") if name in kwargs}
        output = causal_lm.get_decoder()(*ids, **inputs, use_cache=False)
        hidden = output.last_hidden_state[:, :-1]
        with torch.no_grad():  # TRL logs the mean logit: a product with the head's mean row
            bias = 0.0 if head.bias is None else head.bias.mean()
            mean_logits = hidden @ head.weight.mean(0)[:, None] + bias
        return fused_linear_logprobs(hidden, head.weight, targets, bias=head.bias), mean_logits

    causal_lm.forward = forward


TRAINERS = {"trl": ORPOTrainer, "fused": FusedLossORPOTrainer}


def make_trainer(kind: str, model: Any, folder: str, steps: int, is_lora: bool = True) -> Any:
    """Make the one or the other of TRAINERS on the demo's pairs, with LoRA or training it all."""
    quiet = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    arguments = ORPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=PAIRS_PER_STEP,
        learning_rate=2e-3,
        max_length=256,
        bf16=False,  # TRL's defaults are bf16 and recomputed activations; figures are compared here
        gradient_checkpointing=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        **quiet,
    )
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    trainer = TRAINERS[kind](
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(demo.read_rows(PAIRS_PER_STEP * steps)),
        processing_class=AutoTokenizer.from_pretrained(demo.DEMO_MODEL),
        peft_config=lora if is_lora else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def extra_mib_of_one_step(kind: str, folder: str) -> float:
    """Peak memory of one step beyond that of one without head and loss. Needs a fresh process."""
    config = LlamaConfig(vocab_size=LARGE_VOCABULARY, hidden_size=64, num_attention_heads=4)
    config.update({"intermediate_size": 128, "num_hidden_layers": 2})
    trainer = make_trainer(kind, AutoModelForCausalLM.from_config(config), folder, 1)
    model, batch = trainer.model.train(), next(iter(trainer.get_train_dataloader()))
    both = trainer.concatenated_inputs(batch, device=trainer.accelerator.device)
    inputs = both["concatenated_input_ids"], both["concatenated_attention_mask"]
    model.get_base_model().get_decoder()(*inputs).last_hidden_state.sum().backward()
    before = demo.peak_mib()
    trainer.compute_loss(model, batch).backward()
    return demo.peak_mib() - before


def main() -> None:
    """Train with and without the swap, measure one step of each, and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output-dir", default="runs/loss_in_trl")
    parser.add_argument("--measure", choices=TRAINERS, help="one step, in this process")
    options = parser.parse_args()
    folder, extra = options.output_dir, {}
    if options.measure:
        return print(extra_mib_of_one_step(options.measure, folder))
    for kind, name in (("trl", "TRL's own loss"), ("fused", "TRL, loss swapped")):
        model = AutoModelForCausalLM.from_pretrained(demo.DEMO_MODEL, dtype=torch.float32)
        trainer = make_trainer(kind, model, folder, options.steps)
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        print(f"{name}: {demo.fall_of(losses)}")
        command = (__file__, "--measure", kind, "--output-dir", folder)
        extra[kind] = float(demo.run_in_fresh_process(*command))
    trl, fused = extra["trl"], extra["fused"]
    print(f"extra memory of one step with a vocabulary of {LARGE_VOCABULARY:,}:")
    print(f"{trl:.0f} MiB with TRL's loss, {fused:.0f} MiB swapped, {trl / fused:.1f} times less")


if __name__ == "__main__":
    main()
