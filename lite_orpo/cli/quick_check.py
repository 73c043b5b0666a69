"""The three lines about the data that `lite-orpo train` begins with.

The part of `lite-orpo check` that needs no model, on the first rows and for a few seconds. It
is there to be read: it never stops a run.
"""

import logging

from rich.console import Console
from rich.text import Text

from ..data.files.sources import RowSource
from ..data.inspection.finding import Severity
from ..data.inspection.survey import Survey, SurveyOptions, survey_pairs
from ..errors import UserError
from ..report.visible_text import make_visible
from .check_output import formats_in_words, pairs_in_words, repeats_in_words, shortcuts_in_words

logger = logging.getLogger(__name__)

MAX_ROWS = 20_000
MAX_SECONDS = 5.0


def print_quick_check(console: Console, pairs: RowSource, held_out: RowSource | None) -> None:
    """Survey the first rows and print three lines.

    Args:
        console: where; a quiet one costs nothing.
        pairs: what will be trained on.
        held_out: what will be evaluated on.
    """
    if console.quiet:
        return
    options = SurveyOptions(max_rows=MAX_ROWS, max_seconds=MAX_SECONDS)
    try:
        lines = quick_lines(survey_pairs(pairs, held_out=held_out, options=options))
    except UserError:
        return  # the training reads the same rows next, and says what is wrong with them
    except Exception as error:
        # A look at the data is not worth a run: whatever it stumbles on may well train.
        logger.warning("the data was not checked: %s: %s", type(error).__name__, error)
        return
    for line in lines:
        text = Text.assemble((f"{'Check':>10} ", "bold cyan"), make_visible(line))
        console.print(text, soft_wrap=True)


def quick_lines(survey: Survey) -> list[str]:
    """Three lines: what was read, what comes again, what gives the answer away."""
    serious = [f for f in survey.findings if f.severity is Severity.SERIOUS]
    first = f"{pairs_in_words(survey)}: {formats_in_words(survey)}"
    if serious:
        names = ", ".join(f.id.replace("_", " ") for f in serious[:3])
        first += f"; serious: {names} (`lite-orpo check` tells more)"
    return [first, repeats_in_words(survey), f"{shortcuts_in_words(survey)} (in characters)"]
