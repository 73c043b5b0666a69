"""The small world of the demo: what can be asked, and which advice is true there.

Reads demo_world.txt: topics, the things of each topic, and the troubles those things have, each
with two pieces of advice and their reasons. It also says which questions are held out. How
questions and answers are worded lives in demo_voice.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

WORLD_FILE = Path(__file__).with_name("demo_world.txt")
UNSEEN_TOPIC = "strings"
"""The topic without a single training pair: here the preference has to carry over."""


class Advice(NamedTuple):
    """One thing to do (a verb phrase) and why it helps (a clause)."""

    fix: str
    reason: str


class Trouble(NamedTuple):
    """What is wrong: as a verb phrase, as a noun phrase, and the part that it concerns."""

    state: str
    sign: str
    part: str
    advice: tuple[Advice, ...]


class Case(NamedTuple):
    """One thing of one topic with one trouble: what a question is about."""

    topic: str
    thing: str
    trouble: Trouble
    held_out: bool


def _is_held_out(topic: str, thing_index: int, trouble_index: int) -> bool:
    # A diagonal: every thing and every trouble keeps cases on the training side, so a held-out
    # question is new as a combination and not as a word.
    every = 3 if topic == UNSEEN_TOPIC else 9
    return (thing_index + 4 * trouble_index) % every == 0


def _parse_topic(block: str) -> list[Case]:
    header, *lines = block.splitlines()
    topic, _, names = header.partition("] ")
    troubles: list[Trouble] = []
    for line in lines:
        if line.startswith("  "):
            fix, reason = line.strip().split(" => ")
            last = troubles[-1]
            troubles[-1] = last._replace(advice=(*last.advice, Advice(fix, reason)))
        else:
            state, sign, part = line.split(" | ")
            troubles.append(Trouble(state, sign, part, ()))
    topic = topic.removeprefix("[")
    return [
        Case(topic, thing, trouble, _is_held_out(topic, i, j))
        for i, thing in enumerate(names.split(", "))
        for j, trouble in enumerate(troubles)
    ]


def load_cases() -> list[Case]:
    """Return every case of the world, in the order of demo_world.txt."""
    blocks = WORLD_FILE.read_text(encoding="utf-8").strip().split("\n\n")
    return [case for block in blocks for case in _parse_topic(block)]
