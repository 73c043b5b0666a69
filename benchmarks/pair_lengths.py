"""Token counts of preference pairs: what is committed in lengths/, and how each file was made.

A file names a set, says in a sentence how it was made, and lists [prompt, chosen, rejected]. Only
counts are there, no text. A prompt's count includes one BOS and a completion's one EOS, so that a
pair's two sequences have prompt + chosen and prompt + rejected tokens.

    python benchmarks/pair_lengths.py hh_rlhf --transcripts FILE.jsonl[.gz]
    python benchmarks/pair_lengths.py ultrafeedback_like
    python benchmarks/pair_lengths.py long_prompt

The first needs the transcripts of hh-rlhf (MIT) and the `tokenizers` library; the benchmarks need
neither. This file also says how many tokens pass the trunk for given pairs.

Legend: P, C, R tokens of a prompt, a chosen and a rejected completion.
"""

import argparse
import gzip
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).resolve().parent / "lengths"
SET_NAMES = ("hh_rlhf", "ultrafeedback_like", "long_prompt")

SAMPLED = 300
LEAST_TOKENS = 2  # a text token beside the BOS or the EOS
TURN = "\n\nAssistant:"
BPE_TOKENS = 16_384
# Median and sigma of log-normal distributions; means come out near 125, 320 and 290.
PROMPT_LAW, CHOSEN_LAW, REJECTED_LAW = (77.0, 0.95), (265.0, 0.7), (238.0, 0.7)
MOST_PROMPT, MOST_TOKENS = 512, 1024


class PairLength(NamedTuple):
    """Tokens of one preference pair."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def longer_sequence(self) -> int:
        """Tokens of the prompt and the longer completion."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def separate(self) -> int:
        """Tokens of the two sequences, each with the prompt: 2P + C + R."""
        return 2 * self.prompt + self.chosen + self.rejected

    @property
    def shared(self) -> int:
        """Tokens where the prompt is there once: P + C + R."""
        return self.prompt + self.chosen + self.rejected


class LengthSet(NamedTuple):
    """A committed file of lengths."""

    name: str
    source: str
    pairs: list[PairLength]

    def means(self) -> list[float]:
        """Mean P, C and R, rounded to a tenth."""
        return [round(statistics.fmean(column), 1) for column in zip(*self.pairs, strict=True)]

    def sharing_ratio(self) -> float:
        """Tokens of unpadded separate sequences over those with shared prompts."""
        separate = sum(pair.separate for pair in self.pairs)
        return separate / sum(pair.shared for pair in self.pairs)

    def padding_ratio(self, pairs_per_step: int, steps: int = 2000) -> float:
        """Tokens of padded batches over those with shared prompts, over many random batches."""
        batches = list(self.batches(pairs_per_step, steps, seed=1))
        return sum(map(padded_tokens, batches)) / sum(map(shared_tokens, batches))

    def batches(self, pairs_per_step: int, steps: int, seed: int = 0) -> Iterator[list[PairLength]]:
        """Random batches, drawn with replacement, the same for the same arguments."""
        generator = random.Random(f"{self.name} {pairs_per_step} {seed}")
        for _ in range(steps):
            yield generator.choices(self.pairs, k=pairs_per_step)


def padded_tokens(batch: Sequence[PairLength]) -> int:
    """Tokens of a batch whose sequences are all padded to its longest one."""
    return 2 * len(batch) * max(pair.longer_sequence for pair in batch)


def shared_tokens(batch: Sequence[PairLength]) -> int:
    """Tokens of a batch with each prompt once and no padding."""
    return sum(pair.shared for pair in batch)


def read_lengths(name: str) -> LengthSet:
    """One of the committed sets."""
    document = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    pairs = [PairLength(*counts) for counts in document["pairs"]]
    return LengthSet(document["name"], document["source"], pairs)


def write_lengths(lengths: LengthSet, path: Path) -> None:
    """Write a set, ten pairs a line."""
    pairs = [json.dumps(pair) for pair in lengths.pairs]
    lines = [", ".join(pairs[start : start + 10]) for start in range(0, len(pairs), 10)]
    head = f'{{\n "name": {json.dumps(lengths.name)},\n "source": {json.dumps(lengths.source)},\n'
    path.write_text(head + ' "pairs": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n", encoding="utf-8")


# ---- how the sets are made ----


def hh_rlhf(transcripts: Path) -> LengthSet:
    """Count the pairs of a transcripts file with a tokenizer trained on it, and sample some."""
    texts = [split_transcripts(row) for row in _rows(transcripts)]
    count = _byte_level_bpe([text for row in texts for text in (row[0] + row[1], row[2])])
    counted = [PairLength(*(count(text) + 1 for text in row)) for row in texts]
    usable = [pair for pair in counted if min(pair) >= LEAST_TOKENS]
    sampled = random.Random(0).sample(usable, min(SAMPLED, len(usable)))
    source = (
        f"{len(sampled)} pairs sampled (seed 0) from {len(texts):,} of hh-rlhf harmless-base "
        "(Anthropic, MIT); the prompt ends with the last shared Assistant turn's name; counted "
        f"with a byte-level BPE of {BPE_TOKENS:,} tokens trained on these transcripts, plus a BOS "
        "on the prompt and an EOS on each completion"
    )
    return LengthSet("hh_rlhf", source, sampled)


def ultrafeedback_like() -> LengthSet:
    """Draw lengths whose means are about UltraFeedback's; no data set was counted."""
    generator = random.Random(0)

    def draw(law: tuple[float, float], most: int) -> int:
        median, sigma = law
        return min(max(round(median * generator.lognormvariate(0.0, sigma)), LEAST_TOKENS), most)

    pairs = []
    for _ in range(SAMPLED):
        prompt = draw(PROMPT_LAW, MOST_PROMPT)
        room = MOST_TOKENS - prompt
        pairs.append(PairLength(prompt, draw(CHOSEN_LAW, room), draw(REJECTED_LAW, room)))
    laws = ", ".join(
        f"{name} median {median:g} sigma {sigma:g}"
        for name, (median, sigma) in (
            ("prompt", PROMPT_LAW),
            ("chosen", CHOSEN_LAW),
            ("rejected", REJECTED_LAW),
        )
    )
    source = (
        f"SYNTHETIC, no data set was counted: {SAMPLED} independent draws (seed 0) from log-normal "
        f"distributions ({laws}), prompts clipped to {MOST_PROMPT} tokens and completions to what "
        f"is left of {MOST_TOKENS:,}, to have about the means of UltraFeedback"
    )
    return LengthSet("ultrafeedback_like", source, pairs)


def long_prompt() -> LengthSet:
    """The same long prompt and short completions for every pair."""
    source = "SYNTHETIC: every pair is a prompt of 1,024 tokens and two completions of 128"
    return LengthSet("long_prompt", source, [PairLength(1024, 128, 128)] * 4)


def split_transcripts(row: dict[str, str]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of two transcripts: split behind the last shared turn's name."""
    chosen, rejected = row["chosen"], row["rejected"]
    shared = 0
    for left, right in zip(chosen, rejected, strict=False):
        if left != right:
            break
        shared += 1
    border = chosen.rfind(TURN, 0, shared)
    if border < 0:
        raise ValueError(f"two transcripts share no {TURN!r}")
    border += len(TURN)
    return chosen[:border], chosen[border:], rejected[border:]


def _rows(transcripts: Path) -> list[dict[str, str]]:
    opened: Any = gzip.open if transcripts.suffix == ".gz" else open
    with opened(transcripts, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _byte_level_bpe(texts: list[str]) -> Callable[[str], int]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return lambda text: len(tokenizer.encode(text).ids)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", choices=SET_NAMES)
    parser.add_argument("--transcripts", type=Path, help="of hh_rlhf: JSON lines, maybe gzipped")
    options = parser.parse_args()
    if options.name == "hh_rlhf":
        if options.transcripts is None:
            parser.error("hh_rlhf needs --transcripts")
        made = hh_rlhf(options.transcripts)
    else:
        made = {"ultrafeedback_like": ultrafeedback_like, "long_prompt": long_prompt}[
            options.name
        ]()
    write_lengths(made, FOLDER / f"{made.name}.json")
    ratios = ", ".join(f"{made.padding_ratio(n):.2f} ({n})" for n in (1, 2, 4, 8))
    print(
        f"{made.name}: {len(made.pairs)} pairs, means {made.means()}, sharing "
        f"{made.sharing_ratio():.2f}, padded batches over shared prompts: {ratios}"
    )
