"""One method's model, trainer and optimiser, made alike for all: what `step_time.py` times.

A small random Llama with LoRA, a tokenizer with a word for every id, and texts of given token
counts; `baselines.py` makes the trainer from them. Nothing heavy is imported at the top: the
process that a user starts reads the names here too.
"""

import gc
import random
import time
from typing import Any

from pair_lengths import LengthSet, PairLength

SIZES = {
    "small": {"layers": 8, "width": 512, "inner": 1376, "heads": 8, "kv_heads": 4},
    "tiny": {"layers": 2, "width": 32, "inner": 48, "heads": 4, "kv_heads": 2},
}
VOCABULARIES = {"small": 16_384, "tiny": 512}
POSITIONS = 2048
FIRST_WORD = 3  # behind BOS, EOS and the unknown token
BETA, LEARNING_RATE, MOST_NORM = 0.1, 1e-4, 1.0
OURS, PADDED, TRL, FULL_LOGITS = "lite-orpo", "lite-orpo padded", "TRL", "padded full logits"
MIB = 2**20


class Stepper:
    """One method's model, trainer and optimiser, ready to take any round's step."""

    def __init__(
        self,
        method: str,
        specification: dict[str, Any],
        lengths: LengthSet,
        batches: list[list[PairLength]],
        folder: str,
    ) -> None:
        import torch

        self.pairs_per_step = specification["pairs"]
        self.is_cuda = specification["device"] == "cuda"
        shortest = min(lengths.pairs, key=lambda pair: pair.shared)
        counts = [*(pair for batch in batches for pair in batch), shortest]
        self.trainer = _trainer(method, specification, counts, folder)
        self.parameters = [p for p in self.trainer.model.parameters() if p.requires_grad]
        self.start = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.tokens = 0
        self.trainer.model.get_input_embeddings().register_forward_hook(self._count)

    def _count(self, _module: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        self.tokens += inputs[0].numel()

    def warm_up(self) -> None:
        """A step on one short pair, for the imports and the thread pool."""
        self._step(self.trainer.examples[-1:])

    def take(self, number: int) -> dict[str, Any]:
        """The step of a round from the same weights: what it took, its loss and its tokens."""
        first = number * self.pairs_per_step
        return self._step(self.trainer.examples[first : first + self.pairs_per_step])

    def _step(self, examples: list[Any]) -> dict[str, Any]:
        import torch

        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.start, strict=True):
                parameter.copy_(value)
        gc.collect()
        self.tokens = 0
        before = self._allocated_before()
        started, cpu_started = time.perf_counter(), time.process_time()
        loss = self.trainer.forward_and_backward(examples)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, MOST_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.is_cuda:
            torch.cuda.synchronize()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        extra = None
        if before is not None:
            extra = (torch.cuda.max_memory_allocated() - before) / MIB
        return {
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "loss": float(loss),
            "norm": float(norm),
            "tokens": self.tokens,
            "extra_mib": extra,
        }

    def _allocated_before(self) -> int | None:
        import torch

        if not self.is_cuda:
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())


def _trainer(
    method: str, specification: dict[str, Any], counts: list[PairLength], folder: str
) -> Any:
    import baselines

    is_bf16 = specification["dtype"] == "bf16"
    setup = baselines.StepSetup(
        model=_model(specification["model"], is_bf16),
        tokenizer=word_tokenizer(VOCABULARIES[specification["model"]]),
        pairs=random_texts(counts, VOCABULARIES[specification["model"]]),
        pairs_per_step=specification["pairs"],
        beta=BETA,
        max_length=POSITIONS,
        device=specification["device"],
        is_bf16=is_bf16,
        folder=folder,
    )
    if method == TRL:
        return baselines.trl_steps(setup)
    if method == FULL_LOGITS:
        return baselines.full_logits_steps(setup)
    sharing = "on" if method == OURS else "off"
    return baselines.lite_orpo_steps(setup, prefix_sharing=sharing, **specification["row_settings"])


def _model(name: str, is_bf16: bool) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = SIZES[name]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARIES[name],
            hidden_size=size["width"],
            intermediate_size=size["inner"],
            num_hidden_layers=size["layers"],
            num_attention_heads=size["heads"],
            num_key_value_heads=size["kv_heads"],
            max_position_embeddings=POSITIONS,
            tie_word_embeddings=False,
        )
    )
    if is_bf16:
        model = model.to(torch.bfloat16)  # what is frozen; PEFT keeps an adapter in fp32
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear"
    )
    model = get_peft_model(model, lora)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:  # zero at first: A would have no gradient
                parameter.normal_(0.0, 0.02)
    return model


def word_tokenizer(vocabulary: int) -> Any:
    """A tokenizer with a word for every id."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{number}": number for number in range(FIRST_WORD, vocabulary)}
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, **words}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
    )


def random_texts(counts: list[PairLength], vocabulary: int) -> list[dict[str, str]]:
    """Pairs of random words with exactly these token counts."""
    generator = random.Random(0)

    def text(tokens: int) -> str:
        # BOS or EOS is the token that is missing.
        ids = generator.choices(range(FIRST_WORD, vocabulary), k=tokens - 1)
        return " ".join(f"w{number}" for number in ids)

    return [
        {
            "prompt": text(pair.prompt),
            "chosen": " " + text(pair.chosen),
            "rejected": " " + text(pair.rejected),
        }
        for pair in counts
    ]
