"""How far two rules that read nothing get: "the longer one", and "by its first word".

A rule is fitted on one half of the prompts and tried on the other, so that it is not praised
for what it has learnt by heart. Copies of a pair are left out. Pairs of one prompt are no
independent witnesses: the interval counts prompts, not pairs.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from .finding import Finding, Places, Severity
from .seen_row import SeenRow

LEAST_PROMPTS = 20
"""In each half of the prompts, for a rule to be judged."""
_WARNING_FROM, _SERIOUS_FROM = 0.6, 0.75
_FIRSTS_KEPT = 20_000
_FIT, _TRIED = 0, 1


class RuleAccuracy(NamedTuple):
    """How often a rule finds the chosen text, on the half it was not fitted on."""

    accuracy: float
    low: float
    high: float
    """95 % interval (Wilson) over `prompts`."""
    pairs: int
    prompts: int


class Direction(NamedTuple):
    """A first word (or token) and what it says."""

    text: str
    chosen: int
    """Rows whose chosen text, and not the rejected one, begins with it."""
    rejected: int


class LengthRule:
    """The longer text, or the shorter one: whichever was chosen more often in the first half."""

    def __init__(self, unit: str) -> None:
        self._unit = unit
        # Pairs by half: chosen longer, rejected longer, equally long.
        self._counts: list[Counter[int]] = [Counter(), Counter()]
        self._prompts = [0, 0]
        self._places = {1: Places(), -1: Places()}
        self.rows = self.chosen_longer = self.equally_long = 0

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        difference = row.sizes.chosen - row.sizes.rejected
        sign = (difference > 0) - (difference < 0)
        self.rows += 1
        self.chosen_longer += sign > 0
        self.equally_long += sign == 0
        if row.copy_of is not None:
            return
        self._counts[row.half][sign] += 1
        self._prompts[row.half] += row.is_new_prompt
        if sign:
            self._places[sign].add(row.place)

    @property
    def prefers_longer(self) -> bool:
        """What the first half says."""
        return self._counts[_FIT][1] >= self._counts[_FIT][-1]

    def accuracy(self) -> RuleAccuracy | None:
        """None where there are too few different prompts to say."""
        counts = self._counts[_TRIED]
        right = counts[1 if self.prefers_longer else -1] + counts[0] / 2
        return _accuracy(right, counts.total(), self._prompts)

    def findings(self) -> list[Finding]:
        """A finding where the rule is clearly better than a coin."""
        accuracy = self.accuracy()
        if accuracy is None or accuracy.low < _WARNING_FROM:
            return []
        which = "longer" if self.prefers_longer else "shorter"
        places = self._places[1 if self.prefers_longer else -1]
        return [
            Finding(
                "length_gives_it_away",
                _severity(accuracy),
                f"Length alone, in {self._unit}, finds the chosen text in "
                f"{_in_words(accuracy)}: it is the {which} one",
                places.count,
                places.examples,
                f"The model can lower its loss by writing {which} answers without writing better "
                "ones, and a held-out accuracy does not show the difference.",
                f"Compare held-out accuracy with {accuracy.accuracy:.2f}, not with 0.5; add pairs "
                f"whose chosen text is not the {which} one, or drop pairs that differ most.",
            )
        ]


class FirstTokenRule:
    """By the first word (or token) of each text: how often it was chosen in the first half.

    Args:
        unit: "word" or "token".
        name_of: the text of a first word or token, for people.
    """

    def __init__(self, unit: str, name_of: Callable[[str | int], str]) -> None:
        self._unit = unit
        self._name_of = name_of
        self._wins: list[Counter[str | int]] = [Counter(), Counter()]
        self._losses: list[Counter[str | int]] = [Counter(), Counter()]
        self._tried: Counter[tuple[str | int, str | int]] = Counter()
        self._prompts = [0, 0]
        self._places: dict[tuple[str | int, bool], Places] = {}

    def add(self, row: SeenRow) -> None:
        """Look at one row."""
        if row.copy_of is not None:
            return
        chosen, rejected = row.first_chosen, row.first_rejected
        self._prompts[row.half] += row.is_new_prompt
        if row.half == _TRIED:
            self._tried[chosen, rejected] += 1
        if chosen == rejected:
            return
        self._wins[row.half][chosen] += 1
        self._losses[row.half][rejected] += 1
        for key in ((chosen, True), (rejected, False)):
            if key in self._places or len(self._places) < _FIRSTS_KEPT:
                self._places.setdefault(key, Places()).add(row.place)

    def accuracy(self) -> RuleAccuracy | None:
        """None where there are too few different prompts to say."""
        right = 0.0
        for (chosen, rejected), count in self._tried.items():
            difference = self._score(chosen) - self._score(rejected)
            right += count * (0.5 if difference == 0 else float(difference > 0))
        return _accuracy(right, self._tried.total(), self._prompts)

    def directions(self, count: int = 5) -> list[Direction]:
        """The first words that say most, by how much oftener they stand on one side."""
        wins, losses = (half[0] + half[1] for half in (self._wins, self._losses))
        firsts = sorted(
            wins.keys() | losses.keys(), key=lambda f: (-abs(wins[f] - losses[f]), str(f))
        )
        return [Direction(self._name_of(f), wins[f], losses[f]) for f in firsts[:count]]

    def findings(self) -> list[Finding]:
        """A finding where the rule is clearly better than a coin."""
        accuracy = self.accuracy()
        if accuracy is None or accuracy.low < _WARNING_FROM:
            return []
        tellers = ", ".join(
            f"{d.text!r} begins {d.chosen} chosen and {d.rejected} rejected texts"
            for d in self.directions(3)
        )
        places = self._places_of_the_first()
        return [
            Finding(
                "first_token_gives_it_away",
                _severity(accuracy),
                f"The first {self._unit} alone finds the chosen text in {_in_words(accuracy)}: "
                f"{tellers}",
                places.count,
                places.examples,
                "The model can tell the two apart before it has read an answer: it learns how to "
                "begin, not what to say.",
                "See whether the two sides come from two authors or two models; take openings off "
                "that only one side has, or mix in pairs that begin alike.",
            )
        ]

    def _places_of_the_first(self) -> Places:
        wins, losses = (half[0] + half[1] for half in (self._wins, self._losses))
        first = min(wins.keys() | losses.keys(), key=lambda f: (-abs(wins[f] - losses[f]), str(f)))
        return self._places.get((first, wins[first] >= losses[first]), Places())

    def _score(self, first: str | int) -> float:
        return math.log((self._wins[_FIT][first] + 1) / (self._losses[_FIT][first] + 1))


def _accuracy(right: float, pairs: int, prompts: list[int]) -> RuleAccuracy | None:
    if min(prompts) < LEAST_PROMPTS:
        return None
    share = right / pairs
    low, high = wilson_interval(share, min(prompts[_TRIED], pairs))
    return RuleAccuracy(share, low, high, pairs, prompts[_TRIED])


def wilson_interval(share: float, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927); honest for few trials and near 0 and 1."""
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    spread = (
        z
        / (1 + z * z / trials)
        * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    )
    return max(middle - spread, 0.0), min(middle + spread, 1.0)


def _severity(accuracy: RuleAccuracy) -> Severity:
    return Severity.SERIOUS if accuracy.low >= _SERIOUS_FROM else Severity.WARNING


def _in_words(accuracy: RuleAccuracy) -> str:
    return (
        f"{accuracy.accuracy:.0%} of the pairs it was not fitted on "
        f"(95 %: {accuracy.low:.0%} to {accuracy.high:.0%})"
    )
