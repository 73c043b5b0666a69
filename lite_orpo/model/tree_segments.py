"""Which positions of a packed row attend together, and the index tensors and masks that say so.

[prompt | branch] of a pair is a sequence with ordinary causal attention. Each form below is made
once for a row and kept for its layers and its recomputation.

Legend: T tokens of the row, n sequences of at most L tokens in a bucket.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

Span = tuple[int, int, tuple[int, ...]]  # (start, prompt tokens, (tokens of each branch, ...))

# Copied-out sequences are padded to their bucket's longest: at most this much longer than they.
MAX_PADDING_RATIO = 1.5
# The row at work, with and without a window: masks of long rows are large.
_KEPT_LAYOUTS = 2


def tokens_of(spans: tuple[Span, ...]) -> int:
    """Tokens T of the row that the spans describe."""
    start, prompt, branches = spans[-1]
    return start + prompt + sum(branches)


@lru_cache(maxsize=_KEPT_LAYOUTS)
@torch.inference_mode(False)  # what is made in an evaluation must serve a training step too
def pair_masks(
    spans: tuple[Span, ...], window: int | None, device: torch.device
) -> list[list[Tensor | None]]:
    """For each pair, the mask of [prompt | first branch] and those of the other branches."""
    masks: list[list[Tensor | None]] = []
    for _, prompt, branches in spans:
        length = prompt + branches[0]
        is_cut = window is not None and length > window
        pair: list[Tensor | None] = [
            causal_band(length, length, window, device) if is_cut else None
        ]
        pair += [causal_band(branch, prompt + branch, window, device) for branch in branches[1:]]
        masks.append(pair)
    return masks


def causal_band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Which keys the last `queries` of `keys` positions see; bool [1, 1, queries, keys]."""
    own = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    other = torch.arange(keys, device=device)
    seen = other <= own
    if window is not None:
        seen &= own - other < window
    return seen[None, None]


class Buckets(NamedTuple):
    """Sequences copied out of the row, those of similar length together, right-padded."""

    indexes: tuple[Tensor, ...]
    """Of each bucket [n, L]: the row's position that stands there."""
    masks: tuple[Tensor | None, ...]
    """Of each bucket [1, 1, L, L], None where plain causal attention will do."""
    back: Tensor
    """[T]: where each position's result lies among all buckets' positions."""


@lru_cache(maxsize=_KEPT_LAYOUTS)
@torch.inference_mode(False)  # what is made in an evaluation must serve a training step too
def buckets_of(spans: tuple[Span, ...], window: int | None, device: torch.device) -> Buckets:
    """Sort all sequences of a row into buckets; a prompt stands in one sequence per branch."""
    back = torch.empty(tokens_of(spans), dtype=torch.int64)
    indexes: list[Tensor] = []
    masks: list[Tensor | None] = []
    done = 0
    for sequences in _similar_lengths(_sequences(spans)):
        longest = sequences[0].length
        # What stands behind a sequence's end is seen by nothing that is copied back; its own
        # last position, so that the backward pass adds its zeros all over the row.
        index = torch.empty(len(sequences), longest, dtype=torch.int64)
        for number, sequence in enumerate(sequences):
            index[number] = sequence.end - 1
            index[number, : sequence.prompt] = torch.arange(sequence.start, sequence.prompt_end)
            index[number, sequence.prompt : sequence.length] = torch.arange(
                sequence.begin, sequence.end
            )
            at = done + number * longest
            if sequence.is_first:
                back[sequence.start : sequence.prompt_end] = at + torch.arange(sequence.prompt)
            back[sequence.begin : sequence.end] = at + torch.arange(
                sequence.prompt, sequence.length
            )
        done += index.numel()
        indexes.append(index.to(device))
        is_cut = window is not None and longest > window
        masks.append(causal_band(longest, longest, window, device) if is_cut else None)
    return Buckets(tuple(indexes), tuple(masks), back.to(device))


class _Sequence(NamedTuple):
    """[prompt | one branch] of a pair."""

    start: int
    prompt: int
    begin: int
    end: int
    is_first: bool

    @property
    def prompt_end(self) -> int:
        return self.start + self.prompt

    @property
    def length(self) -> int:
        return self.prompt + self.end - self.begin


def _sequences(spans: tuple[Span, ...]) -> Iterator[_Sequence]:
    for start, prompt, branches in spans:
        begin = start + prompt
        for which, branch in enumerate(branches):
            yield _Sequence(start, prompt, begin, begin + branch, which == 0)
            begin += branch


def _similar_lengths(sequences: Iterator[_Sequence]) -> Iterator[list[_Sequence]]:
    bucket: list[_Sequence] = []
    for sequence in sorted(sequences, key=lambda sequence: -sequence.length):
        if bucket and bucket[0].length > MAX_PADDING_RATIO * sequence.length:
            yield bucket
            bucket = []
        bucket.append(sequence)
    if bucket:
        yield bucket


class VarlenSegments(NamedTuple):
    """Queries in the row's order, cut into segments, and the keys that each segment sees."""

    key_index: Tensor
    """Positions of the keys of all segments, one after another."""
    query_bounds: Tensor
    """Where each segment's queries begin and end, int32; they lie in the row's order."""
    key_bounds: Tensor
    longest_query: int
    longest_key: int


@lru_cache(maxsize=_KEPT_LAYOUTS)
@torch.inference_mode(False)  # what is made in an evaluation must serve a training step too
def varlen_segments(spans: tuple[Span, ...], device: torch.device) -> VarlenSegments:
    """Segments [prompt | first branch], then one for each other branch."""
    positions: list[int] = []
    queries, keys = [0], [0]
    for sequence in _sequences(spans):
        if sequence.is_first:
            queries.append(queries[-1] + sequence.length)
        else:
            queries.append(queries[-1] + sequence.end - sequence.begin)
        keys.append(keys[-1] + sequence.length)
        positions += range(sequence.start, sequence.prompt_end)
        positions += range(sequence.begin, sequence.end)
    return VarlenSegments(
        torch.tensor(positions, device=device),
        torch.tensor(queries, dtype=torch.int32, device=device),
        torch.tensor(keys, dtype=torch.int32, device=device),
        max(b - a for a, b in zip(queries, queries[1:], strict=False)),
        max(b - a for a, b in zip(keys, keys[1:], strict=False)),
    )


def forget_layouts() -> None:
    """Drop the index tensors that are kept; those of a trace have no data, and true ones do."""
    for made in (pair_masks, buckets_of, varlen_segments):
        made.cache_clear()
