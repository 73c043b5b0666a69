"""`lite-orpo check DATA --model M --show N`: one pair, token by token, as the trainer sees it."""

from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from ..data.files.sources import LocatedRow, RowSource
from ..data.formats.rows import parse_row
from ..data.preparation import LengthRule, fit
from ..data.tokens.tokenization import TokenizedPair, tokenize_pair
from ..errors import ConfigError, DataError, RowProblem
from ..report.visible_text import make_visible
from .check_target import CheckTarget

_STYLES = {"prompt": "cyan", "chosen": "green", "rejected": "red"}
_BORDER, _PART = "│", "‥"
_WORDS_IN_ONE_FILE = 2  # "line 3"; in a folder of files, the file's name stands before it
_MOST_NAMED = 4
_MOST_PARTS = 8  # a token of what is no character at all must not hide the rest


class ShownToken(NamedTuple):
    """One token, and what it is to the loss."""

    text: str
    part: str
    """prompt, chosen or rejected."""
    is_eos: bool
    is_scored: bool


def show_row(target: CheckTarget, wanted: str) -> None:
    """Print the tokens of one row.

    Args:
        target: the data and the model.
        wanted: number of the line, entry or row as findings and errors count them, or the whole
            place as they write it.

    Raises:
        ConfigError: there is no model to take the tokenizer from.
        DataError: there is no such row, or it cannot be trained on.
    """
    if target.model.model_name_or_path is None:
        raise ConfigError("--show needs --model: tokens are a tokenizer's")
    from .check import load_check_tokenizer

    console = Console()
    source, _ = target.open()
    located = find_row(source, wanted)
    tokenizer, rule = load_check_tokenizer(target.model, target.rule, console)
    try:
        pair = tokenize_pair(parse_row(located.row), tokenizer)
    except RowProblem as problem:
        raise DataError(f"{source.name} {located.place}: {problem}") from None
    whole = pair
    try:
        pair = fit(whole, rule)
        outcome = _outcome_in_words(whole, pair, rule)
    except RowProblem:
        outcome = f"over max_length {rule.max_length}: the row is left out"
    console.print(Text(f"{make_visible(source.name)}, {located.place}", style="bold"))
    _print_legend(console, target.nll_tokens)
    for part in TokenizedPair._fields:
        tokens = shown_tokens(pair, part, tokenizer, target.nll_tokens)
        console.print(_heading(part, tokens))
        console.print(_as_text(tokens), soft_wrap=not console.is_terminal)
    length = len(whole.prompt) + max(len(whole.chosen), len(whole.rejected))
    console.print(Text(f"{length} tokens with the longer answer; {outcome}", style="bold"))


def find_row(source: RowSource, wanted: str) -> LocatedRow:
    """The one row whose place ends in these words.

    Args:
        source: the pairs.
        wanted: "3" for "line 3", "entry 3" or "row 3"; where files of a folder each have one, the
            whole place, such as "train-00001-of-00002.parquet row 3".

    Raises:
        DataError: there is none, or there are several.
    """
    words = wanted.split()
    found: list[LocatedRow] = []
    last, count = "none", 0
    for located in source.read():
        place = located.place.split()
        last = located.place
        if not words or place[-len(words) :] != words:
            continue
        count += 1
        if len(found) < _MOST_NAMED:
            found.append(located)
        if len(place) == _WORDS_IN_ONE_FILE or len(place) == len(words):
            break  # no other row has that place
    if not found:
        raise DataError(f"{source.name}: there is no row {wanted}; the last one is {last}")
    if count == 1:
        return found[0]
    places = ", ".join(located.place for located in found) + (", ..." if count > len(found) else "")
    raise DataError(
        f"{source.name}: {count} files have a row {wanted}: {places}; say which: "
        f'--show "{found[0].place}"'
    )


def shown_tokens(
    pair: TokenizedPair, part: str, tokenizer: Any, nll_tokens: str
) -> list[ShownToken]:
    """The tokens of one part of a pair.

    Args:
        pair: the token ids.
        part: prompt, chosen or rejected.
        tokenizer: the one they are of.
        nll_tokens: "completion" leaves the prompt unscored.
    """
    ids: list[int] = getattr(pair, part)
    texts = _texts_of(ids, tokenizer)
    is_prompt = part == "prompt"
    shown = []
    for i, (token_id, text) in enumerate(zip(ids, texts, strict=True)):
        is_eos = not is_prompt and i == len(ids) - 1 and token_id == tokenizer.eos_token_id
        # Nothing stands before a sequence's first token to predict it from.
        is_scored = not is_prompt or (nll_tokens != "completion" and i > 0)
        shown.append(ShownToken(text, part, is_eos, is_scored))
    return shown


def _texts_of(ids: list[int], tokenizer: Any) -> list[str]:
    """A text for each token; one for all tokens that make up a character, behind the last."""
    texts: list[str] = []
    parts: list[int] = []
    for token_id in ids:
        parts.append(token_id)
        text = str(tokenizer.decode(parts))
        is_part = (not text or "\ufffd" in text) and len(parts) < _MOST_PARTS
        if is_part and token_id not in tokenizer.all_special_ids:
            texts.append(_PART)
            continue
        raw = str(tokenizer.convert_ids_to_tokens(parts[0]))
        if raw.startswith("\u2581") and not text.startswith(" "):
            text = f" {text}"  # SentencePiece's decoder takes a leading space away
        texts.append(make_visible(text or raw).replace(" ", "·"))
        parts = []
    return texts


def _as_text(tokens: list[ShownToken]) -> Text:
    text = Text(overflow="fold")
    for token in tokens:
        style = "bold reverse yellow" if token.is_eos else _STYLES[token.part]
        text.append(token.text, style=style + (" underline" if token.is_scored else ""))
        text.append(_BORDER, style="dim")
        if "⏎" in token.text:
            text.append("\n")
    return text


def _heading(part: str, tokens: list[ShownToken]) -> Text:
    scored = sum(token.is_scored for token in tokens)
    ends = ", ends in EOS" if tokens and tokens[-1].is_eos else ""
    return Text(f"\n{part}: {len(tokens)} tokens, {scored} scored{ends}", style="bold")


def _print_legend(console: Console, nll_tokens: str) -> None:
    legend = Text("  ")
    for part, style in _STYLES.items():
        legend.append(part, style=style)
        legend.append("  ")
    legend.append("EOS", style="bold reverse yellow")
    legend.append("  ")
    legend.append("scored (a label)", style="underline")
    legend.append(f"   {_BORDER} ends a token, · is a space, ⏎ a line break, ⇥ a tab, ")
    legend.append(f"{_PART} a part of the next character")
    console.print(legend)
    in_prompt = (
        "the prompt is not scored"
        if nll_tokens == "completion"
        else "the NLL term scores the prompt, too (nll_tokens: prompt_and_completion)"
    )
    console.print(
        "  Chosen is scored by the NLL term and the odds ratio, rejected by the odds ratio; "
        f"{in_prompt}.",
        style="dim",
        highlight=False,
    )


def _outcome_in_words(whole: TokenizedPair, fitted: TokenizedPair, rule: LengthRule) -> str:
    """What becomes of a row that is not left out."""
    if rule.max_length is None:
        return "there is no max_length"
    cut = len(whole.prompt) - len(fitted.prompt)
    if not cut:
        return f"within max_length of {rule.max_length}"
    return (
        f"over max_length {rule.max_length}: {cut} tokens of the prompt, behind its first one, "
        "are cut and not shown"
    )
