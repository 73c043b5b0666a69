r"""HH-RLHF transcripts: two texts that are a whole conversation each, alike up to where they part.

The prompt is everything up to and including the last "\n\nAssistant:" that both texts share. The
text stays as it is, so prompt and completion together are the original. Data: Anthropic's hh-rlhf
(arXiv 2204.05862).
"""

from os.path import commonprefix

from ...errors import RowProblem
from ..preference_row import PreferenceRow

HUMAN, NEXT_TURN, ASSISTANT = "Human:", "\n\nHuman:", "\n\nAssistant:"


def is_transcript(text: str) -> bool:
    """Whether a text begins with the person's turn and has one of the assistant."""
    return text.lstrip().startswith(HUMAN) and ASSISTANT in text


def begins_transcript(prompt: str, transcript: str) -> bool:
    """Whether a transcript begins with a prompt, written with the marks of its turns or without.

    The prompt is whole turns: "What is" does not begin "Human: What is tea?".
    """
    text = prompt.strip().removesuffix(ASSISTANT.strip()).strip()
    begun = transcript.strip()
    if not text.startswith(HUMAN):
        begun = begun.removeprefix(HUMAN).lstrip()
    return begun.startswith(text) and begun[len(text) :].startswith((NEXT_TURN, ASSISTANT))


def split_transcripts(chosen: str, rejected: str) -> PreferenceRow:
    """Part prompt and completions.

    Args:
        chosen: the transcript with the better answer.
        rejected: the one with the worse.

    Returns:
        A row of texts; the prompt ends in "Assistant:".

    Raises:
        RowProblem: the transcripts share no beginning that ends in the assistant's turn, are one
            and the same, or one has no answer.
    """
    if chosen == rejected:
        raise RowProblem("rejected", "is identical to column 'chosen': nothing to prefer")
    shared = commonprefix([chosen, rejected])
    start = shared.rfind(ASSISTANT)
    if start < 0:
        raise RowProblem(
            "prompt",
            "cannot be found: no beginning that both transcripts share ends in 'Assistant:'",
        )
    border = start + len(ASSISTANT)
    row = PreferenceRow(shared[:border], chosen[border:], rejected[border:])
    for column, answer in (("chosen", chosen[border:]), ("rejected", rejected[border:])):
        if not answer.strip():
            raise RowProblem(column, "has an empty last answer in its transcript")
        if not answer.split(NEXT_TURN)[0].strip():
            raise RowProblem(column, "has an empty answer before the person speaks again")
    return row
