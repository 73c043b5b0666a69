"""Raw rows -> a data set of token ids, with a report of every row that was cut or left out.

The rule for rows over `max_length` and the policy for rows that cannot be trained on are
applied here, before training. The token ids go to an Arrow file that is mapped, not loaded, so
memory does not grow with the data (without `datasets` they stay in a list).
"""

import logging
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

from ..errors import DataError, RowProblem
from .files.sources import RowSource
from .formats.rows import PreferenceRow
from .parsed_rows import parsed_chunks, tokenized
from .preparation_report import TOOLS
from .preparation_report import PreparationReport as PreparationReport
from .tokens.chat_template import TemplateRunaway
from .tokens.special_text import Tokenizer
from .tokens.tokenization import RowTokenizer, TokenizedPair

logger = logging.getLogger(__name__)

MAX_DROPPED_SHARE = 0.1


class LengthRule(NamedTuple):
    """What is too long, and what happens then."""

    max_length: int | None
    overlong_rows: str  # "drop" or "cut_prompt"


class PreparedPairs(NamedTuple):
    """Tokenised pairs, and the report about them."""

    dataset: Any
    report: PreparationReport


def prepare_pairs(
    source: RowSource, tokenizer: Tokenizer, rule: LengthRule, on_bad_row: str = "drop"
) -> PreparedPairs:
    """Tokenise a source's rows into a map-style data set.

    Its rows have `prompt_input_ids`, `chosen_input_ids`, `rejected_input_ids` (lists of ints),
    `length` (tokens of the longer sequence) and `row` (number in the source, from 0).

    Args:
        source: where the rows come from.
        tokenizer: a transformers tokenizer.
        rule: the rule for over-long rows.
        on_bad_row: "drop" leaves bad rows out and reports them; "error" stops at the first.

    Returns:
        The data set and its report.

    Raises:
        DataError: the source is unreadable or empty, `on_bad_row` is "error" and a row is bad,
            or all rows or more than 10 % of them are bad.
    """
    report = PreparationReport(source.name)
    records = _records(source, tokenizer, rule, on_bad_row, report)
    if find_spec("datasets") is None:
        dataset: Any = list(records)
    else:
        dataset = _map_from_disk(records)
    _check_report(report)
    for line in report.lines()[1:]:
        logger.warning("%s:%s", source.name, line[1:])
    return PreparedPairs(dataset, report)


def _records(
    source: RowSource,
    tokenizer: Tokenizer,
    rule: LengthRule,
    on_bad_row: str,
    report: PreparationReport,
) -> Iterator[dict[str, Any]]:
    from tqdm.auto import tqdm

    located = tqdm(
        source.read(),
        total=source.size,
        desc=f"Tokenising {source.name}",
        unit=" rows",
        delay=2.0,  # a small file needs no bar
        leave=False,
    )
    row_tokenizer = RowTokenizer(tokenizer)
    shows_tools = "tools" in str(tokenizer.chat_template)
    for chunk in parsed_chunks(located):
        for item, outcome in zip(chunk, tokenized(chunk, row_tokenizer), strict=False):
            if isinstance(outcome, TemplateRunaway):
                raise DataError(f"{source.name} {item.place}: {outcome}")
            if isinstance(outcome, DataError):
                raise outcome
            try:
                if isinstance(outcome, RowProblem):
                    raise outcome
                fitted = fit(outcome.pair, rule)
            except RowProblem as problem:
                if on_bad_row == "error":
                    raise DataError(f"{source.name} {item.place}: {problem}") from None
                report.add_dropped(item.place, problem)
                continue
            assert isinstance(item.row, PreferenceRow)
            report.kept += 1
            report.cut += len(fitted.prompt) < len(outcome.pair.prompt)
            report.repeated_prompt_rows += _repeats_prompt(item.row)
            report.several_turns_rows += _has_several_turns(item.row)
            report.unwritten_rows.update(outcome.unwritten)
            if item.row.tools and not shows_tools:
                report.unwritten_rows[TOOLS] += 1
            if outcome.special_text is not None:
                report.add_special_text(item.place, outcome.special_text)
            yield {
                "prompt_input_ids": fitted.prompt,
                "chosen_input_ids": fitted.chosen,
                "rejected_input_ids": fitted.rejected,
                "length": len(fitted.prompt) + max(len(fitted.chosen), len(fitted.rejected)),
                "row": item.number,
            }


def fit(pair: TokenizedPair, rule: LengthRule) -> TokenizedPair:
    """Apply the rule for over-long rows. Completions are never cut: each keeps its EOS."""
    longest = max(len(pair.chosen), len(pair.rejected))
    if rule.max_length is None or len(pair.prompt) + longest <= rule.max_length:
        return pair
    column = "chosen" if len(pair.chosen) >= len(pair.rejected) else "rejected"
    sizes = f"{len(pair.prompt)} prompt + {longest} completion tokens"
    room = rule.max_length - longest
    if room < 2:
        raise RowProblem(
            column,
            f"is too long: {sizes}, max_length {rule.max_length} leaves no room for a prompt "
            "(raise max_length)",
        )
    if rule.overlong_rows == "drop":
        raise RowProblem(
            "prompt" if len(pair.prompt) > longest else column,
            f"is too long: {sizes}, max_length is {rule.max_length} (raise it, or set "
            "overlong_rows: cut_prompt)",
        )
    # The first token (BOS, or the template's opening) stays; the oldest text after it goes.
    return pair._replace(prompt=[pair.prompt[0], *pair.prompt[len(pair.prompt) - room + 1 :]])


def _repeats_prompt(row: PreferenceRow) -> bool:
    if not isinstance(row.prompt, str) or not row.prompt.strip():
        return False
    prompt = row.prompt
    return str(row.chosen).startswith(prompt) and str(row.rejected).startswith(prompt)


def _has_several_turns(row: PreferenceRow) -> bool:
    return row.is_conversational and max(len(row.chosen), len(row.rejected)) > 1


def _map_from_disk(records: Iterator[dict[str, Any]]) -> Any:
    import datasets
    import pyarrow as pa

    ids = pa.list_(pa.int32())
    schema = pa.schema(
        [
            ("prompt_input_ids", ids),
            ("chosen_input_ids", ids),
            ("rejected_input_ids", ids),
            ("length", pa.int32()),
            ("row", pa.int64()),
        ]
    )
    folder = tempfile.mkdtemp(prefix="lite-orpo-")
    path = f"{folder}/pairs.arrow"
    try:
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            batch: list[dict[str, Any]] = []
            for record in records:
                batch.append(record)
                if len(batch) == 1000:
                    writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                    batch = []
            writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
        dataset = datasets.Dataset.from_file(path)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    # The folder goes when the data set does.
    weakref.finalize(dataset, shutil.rmtree, folder, ignore_errors=True)
    return dataset


def _check_report(report: PreparationReport) -> None:
    total = report.kept + report.dropped
    if total == 0:
        raise DataError(f"{report.source}: no rows; the file or data set is empty")
    if report.dropped <= MAX_DROPPED_SHARE * total:
        return
    kind, count = report.problems.most_common(1)[0]
    first = report.examples[kind][0]
    share = f"none of {total} rows" if report.kept == 0 else f"only {report.kept} of {total} rows"
    alike = f"{count} rows like {first.place}" if count > 1 else first.place
    raise DataError(
        f"{report.source}: {share} can be trained on (at most {MAX_DROPPED_SHARE:.0%} may be left "
        f"out): {alike}: column {first.column!r} {first.problem}; mend these rows or delete them"
    )
