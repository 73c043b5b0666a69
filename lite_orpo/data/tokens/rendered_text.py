"""Completions that are whole conversations, as a chat template has written them already.

Notebooks map `apply_chat_template(..., tokenize=False)` over messages and leave the prompt column
beside the result. Taken at its word, such a row would repeat the prompt in its answer, in spelled
out control tokens. Here it is parted where the answer begins: behind the last generation prompt
that both texts share.
"""

from os.path import commonprefix
from typing import NamedTuple

from ...errors import RowProblem
from .special_text import SpecialTokens, Tokenizer
from .template_limits import within_limits


class RenderedRow(NamedTuple):
    """The three texts of a row, parted anew."""

    prompt: str
    chosen: str
    rejected: str


def generation_prompt(tokenizer: Tokenizer) -> str:
    """What the chat template writes in front of an answer; "" where that is not known."""
    if not tokenizer.chat_template:
        return ""

    def render(asks: bool) -> str:
        messages = [{"role": "user", "content": "x"}]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
        return str(text)

    try:
        said = within_limits(lambda: render(asks=False))
        asked = within_limits(lambda: render(asks=True))
    except Exception:  # a template is a program: it can raise whatever Python can
        return ""
    return asked[len(said) :] if asked.startswith(said) else ""


def part_rendered(
    prompt: str, chosen: str, rejected: str, special: SpecialTokens, opening: str
) -> RenderedRow | None:
    """Part two rendered conversations into prompt and answers.

    Args:
        prompt: the prompt column, as text; it must stand in what both share.
        chosen: the text of the better answer.
        rejected: of the worse.
        special: the tokenizer's special tokens.
        opening: what `generation_prompt` returned.

    Returns:
        The row, or None where the texts are no conversations that a template has written.

    Raises:
        RowProblem: they are, but they are not about this prompt, or one has no answer.
    """
    begins = all(special.pattern.match(text.lstrip()) for text in (chosen, rejected))
    shared = commonprefix([chosen, rejected])
    start = shared.rfind(opening) if opening and begins else -1
    if start < 0:
        return None
    border = start + len(opening)
    if prompt.strip() not in shared[:border]:
        raise RowProblem(
            "prompt",
            "is not in the text that both completions begin with, which are whole conversations "
            "as the chat template writes them; pass messages, and leave the template to the "
            "trainer",
        )
    row = RenderedRow(shared[:border], chosen[border:], rejected[border:])
    for column in ("chosen", "rejected"):
        if not special.pattern.sub("", getattr(row, column)).strip():
            raise RowProblem(column, "has an empty answer behind the conversation")
    return row
