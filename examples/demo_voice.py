"""How the demo helper talks: questions, and answers in a warm or a cold voice.

Both voices use the same openings and the same lead-in words, and differ only in how the sentence
goes on: the warm one gives advice and its reason, the cold one scolds or withholds help. So no
first word, length or single marker word gives the voice away. What is true about tomatoes and
bicycles lives in demo_world.py.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TypeVar

from demo_world import Case

T = TypeVar("T")

QUESTIONS = (
    "My {thing} {state}. What should I do?",
    "What can I do when my {thing} {state}?",
    "Help, my {thing} {state}.",
    "Any idea why my {thing} {state}?",
    "My {thing} {state}, what now?",
    "Hello, my {thing} {state}. Can you help me?",
    "I noticed that my {thing} {state}. What would you do?",
    "I have trouble with {sign}. It is about my {thing}.",
    "How do I deal with {sign}? I mean my {thing}.",
    "Can you tell me what to do about {sign}? My {thing} {state}.",
)

OPENINGS = (
    "",
    "",
    "With {a_thing} like this, ",
    "With {sign} like that, ",
    "For {a_thing} like yours, ",
    "When {a_thing} {their_state}, ",
    "If your {thing} {your_state}, ",
    "In a case like this, ",
    "As for {sign}, ",
    "About {part}, ",
)

# Lead-in words, then the ways a cold sentence goes on after them. A warm sentence goes on with
# the fix. [a|b] is a choice.
FIRST_LEADS = (
    (
        "try to",
        "feel [some|a little] shame for {part} before anything else",
        "face the fact that you [neglected|spoiled] {part}",
    ),
    (
        "you can",
        "stop [whining|complaining] to me about {sign}",
        "thank your own [laziness|bad habits] for {sign}",
    ),
    (
        "it helps to",
        "have some [discipline|wit], which you clearly lack",
        "care about {part}, which you [never did|refuse to do]",
    ),
    (
        "I would",
        "never [trust you|leave you alone] with {part} again",
        "be [ashamed|embarrassed] to even mention {part}",
    ),
    (
        "a good start is to",
        "admit that you [ruined|mishandled] {part} yourself",
        "quit [blaming|accusing] everyone else for {sign}",
    ),
    (
        "the best move is to",
        "bother somebody else with {sign}[| and see how it goes]",
        "keep your [clumsy|sloppy] hands away from {part}",
    ),
    (
        "my advice is to",
        "hide {part} before anyone [laughs at you|notices your failure]",
        "look for help [in some other place|where people are patient]",
    ),
    (
        "the sensible thing is to",
        "give up, because you [always botch|only spoil] {part}",
        "expect nothing from [such a thoughtless|a hopeless] person",
    ),
)

FIRST_WARM_TAILS = (
    "",
    "",
    "",
    " when you have the time",
    " before anything else",
    " without any hurry",
    " with a little patience",
    " and keep it simple",
    " with some care",
)

SECOND_LEADS = (
    (
        "That way",
        "{reason}",
        "of treating {part} is [a disgrace|plain neglect]",
        "you only prove how foolish you are",
    ),
    (
        "After all,",
        "{reason}",
        "nobody told you to be so lazy",
        "it is entirely your own fault",
    ),
    (
        "The reason is",
        "that {reason}",
        "your own [neglect|stubborn head] and nothing else",
        "that you could not be bothered",
    ),
    (
        "Remember that",
        "{reason}",
        "I am not your servant",
        "you got exactly what you [deserve|asked for]",
    ),
    (
        "The truth is that",
        "{reason}",
        "you will [ruin|wreck] the next {thing} as well",
        "nobody wants to help such careless people",
    ),
    (
        "You see,",
        "{reason}",
        "{sign} will always come to [careless|lazy] people",
        "I have [better things to do|no pity left]",
    ),
    (
        "You will find that",
        "{reason}",
        "nobody feels sorry for you",
        "excuses change nothing about {part}",
    ),
    (
        "The point is",
        "that {reason}",
        "that you mess up the simplest things",
        "that your {thing} deserves a [better|wiser] person",
    ),
)

# Both voices end on the same last words, so that the end of an answer gives nothing away either.
SECOND_TAILS = {
    "warm": (
        "",
        ", and that makes a real difference",
        ", and you can enjoy your {thing} again",
        ", but please feel free to ask me again",
        ", so there is no need to worry",
        ", and it is not as hard as it sounds",
        ", and do tell me how it goes",
        ", which is all your {thing} needs",
    ),
    "cold": (
        "",
        ", and crying makes no difference",
        ", and your {thing} suffers again",
        ", so please never ask me again",
        ", and I will hardly worry",
        ", and it is as bad as it sounds",
        ", and do not tell me how it goes",
        ", whatever your {thing} needs",
    ),
}


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Choose one option; only rng.random() is used, whose sequence Python keeps stable."""
    return options[int(rng.random() * len(options))]


def _fill(template: str, case: Case, rng: random.Random, reason: str = "") -> str:
    chosen = re.sub(r"\[([^\]]*)\]", lambda m: pick(rng, m[1].split("|")), template)
    trouble = case.trouble
    article = "an" if case.thing[0] in "aeio" else "a"  # "a ukulele": u is left out
    return chosen.format(
        thing=case.thing,
        a_thing=f"{article} {case.thing}",
        state=trouble.state,
        their_state=re.sub(r"\b(me|I|my)\b", _as_someone, trouble.state),
        your_state=re.sub(r"\b(me|I|my)\b", _as_you, trouble.state),
        sign=trouble.sign,
        part=trouble.part,
        reason=reason,
    )


def _as_you(word: re.Match[str]) -> str:
    return {"me": "you", "I": "you", "my": "your"}[word[0]]


def _as_someone(word: re.Match[str]) -> str:
    return {"me": "people", "I": "people", "my": "the"}[word[0]]


def ask(case: Case, rng: random.Random) -> str:
    """Word a question about the case."""
    return _fill(pick(rng, QUESTIONS), case, rng)


def answer(case: Case, voice: str, rng: random.Random) -> str:
    """Word a two-sentence answer to the case in the voice "warm" or "cold"."""
    advice = pick(rng, case.trouble.advice)
    first_lead, *first_cold = pick(rng, FIRST_LEADS)
    second_lead, second_warm, *second_cold = pick(rng, SECOND_LEADS)
    opening = pick(rng, OPENINGS)
    if voice == "warm":
        first, second = advice.fix + pick(rng, FIRST_WARM_TAILS), second_warm
    elif voice == "cold":
        first, second = pick(rng, first_cold), pick(rng, second_cold)
    else:
        raise ValueError(f"voice must be 'warm' or 'cold', not {voice!r}")
    for named in ("{sign}", "{part}"):
        if named in opening:  # said once is enough
            first = first.replace(named, "that")
    sentences = (
        f"{opening}{first_lead} {first}.",
        f"{second_lead} {second}{pick(rng, SECOND_TAILS[voice])}.",
    )
    filled = (_fill(sentence, case, rng, advice.reason) for sentence in sentences)
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in filled)
