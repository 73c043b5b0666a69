"""`lite-orpo generate`: a benchmark's prompts answered in batches, into the file that it wants."""

import contextlib
import hashlib
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..checkpoint.fingerprint import weights_digest
from ..config.yaml_file import Setting
from ..data.files.sources import open_source
from ..errors import CheckpointError, ConfigError, DataError
from ..generation.answering import Answerer, BatchSize, Question, answers_in_batches, seed_of
from ..generation.journal import Entry, Journal
from ..generation.prompt_file import FORMATS, MT_BENCH, Item, read_items, write_answers
from ..generation.prompts import prompt_of
from ..model.adapter import adapter_switched_off
from .target import Target, load_target_model, load_target_tokenizer, resolve_target
from .train import quiet_libraries

_LENGTHS = {"alpaca_eval": 2048, "mt_bench": 1024}  # FastChat's; AlpacaEval's usual


class GenerateOptions(NamedTuple):
    """The options of the command; None: not given."""

    form: str
    output: Path
    batch_size: int
    max_new_tokens: int | None
    temperature: float | None
    seed: int
    base: str | None
    adapter_off: bool
    name: str | None
    overwrite: bool


def run_generation(
    target_name: str, prompts: str, overrides: dict[str, Setting], options: GenerateOptions
) -> None:
    """Answer every prompt that has no answer yet, and write the output.

    Args:
        target_name: a run's folder, an adapter, a model or a configuration.
        prompts: the prompt file.
        overrides: settings from the command line.
        options: the command's own.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    console = Console(stderr=True)
    quiet_libraries(console)
    _check(options)
    items = read_items(open_source(prompts, split="train"), options.form)
    target = resolve_target(target_name, options.base, overrides)
    if options.adapter_off and target.adapter is None:
        raise ConfigError(f"--adapter-off: {target.name} has no adapter")
    tokenizer = load_target_tokenizer(target)
    model = load_target_model(target, is_scored=False)
    run = _Run(items, options, Answerer(model, tokenizer), tokenizer, console)
    journal = Journal(options.output, _made_of(target, model, items, options, run.max_new_tokens))
    run.refuse_what_never_fits(prompts)
    if journal.found:
        console.print(f"  goes on: {len(journal.found)} answers are in {journal.path.name}")
    journal.begin()
    try:
        with adapter_switched_off(model) if options.adapter_off else contextlib.nullcontext():
            run.answer_all(journal)
    except KeyboardInterrupt:
        console.print(f"  stopped; the same command goes on from {journal.path.name}")
        raise SystemExit(130) from None
    name = options.name or target.name + ("-base" if options.adapter_off else "")
    _write(options, items, run, name)
    journal.remove()
    console.print(f"  written: {options.output} ({len(items)} prompts, {name})", soft_wrap=True)


class _Run:
    def __init__(
        self,
        items: list[Item],
        options: GenerateOptions,
        answerer: Answerer,
        tokenizer: Any,
        console: Console,
    ) -> None:
        self._items = items
        self._options = options
        self._answerer = answerer
        self._tokenizer = tokenizer
        self._console = console
        self.answers: dict[tuple[int, int], Entry] = {}
        wanted = options.max_new_tokens or _LENGTHS[options.form]
        positions = answerer.positions
        self.max_new_tokens = wanted if positions is None else min(wanted, positions // 2)
        if self.max_new_tokens < wanted:
            console.print(
                f"  answers have {self.max_new_tokens} tokens at most: half of the model's "
                f"{positions} positions"
            )
        if not tokenizer.chat_template:
            console.print("  the tokenizer has no chat template: prompts are plain text")

    def refuse_what_never_fits(self, name: str) -> None:
        """Before an hour is spent on the others."""
        for number, item in enumerate(self._items):
            for turn in item.turns:
                try:
                    self._question(number, [{"role": "user", "content": turn}], 0)
                except DataError as error:
                    raise DataError(f"{name} prompt {number + 1}: {error}") from None

    def answer_all(self, journal: Journal) -> None:
        """Turn by turn, for a second one sees the answer to the first."""
        self.answers = {(entry.number, entry.turn): entry for entry in journal.found}
        places = [(n, t) for n, item in enumerate(self._items) for t in range(len(item.turns))]
        batch_size = BatchSize(self._options.batch_size)
        cut = 0
        with self._bar() as bar:
            task = bar.add_task("Answering", total=len(places), completed=len(self.answers))
            for turn in range(max(len(item.turns) for item in self._items)):
                missing = [n for n, t in places if t == turn and (n, t) not in self.answers]
                asked = [self._question(n, self._messages(n, turn), turn) for n in missing]
                cut += sum(dropped > 0 for _, dropped in asked)
                questions = [question for question, _ in asked]
                for numbers, texts in answers_in_batches(self._answerer, questions, batch_size):
                    entries = [
                        Entry(missing[number], turn, text, time.time())
                        for number, text in zip(numbers, texts, strict=True)
                    ]
                    journal.add(entries)
                    self.answers.update({(entry.number, turn): entry for entry in entries})
                    bar.advance(task, len(entries))
                    self._tell_in_a_log(len(entries), len(places))
        if cut:
            self._console.print(
                f"  {cut} later turns were answered without the first: the model's positions"
            )

    def _tell_in_a_log(self, new: int, total: int) -> None:
        """Where there is no bar, a line for each tenth."""
        done = len(self.answers)
        if not self._console.is_terminal and 10 * done // total > 10 * (done - new) // total:
            self._console.print(f"  answered {done} of {total}", highlight=False)

    def _messages(self, number: int, turn: int) -> list[dict[str, str]]:
        messages = []
        for earlier in range(turn + 1):
            messages.append({"role": "user", "content": self._items[number].turns[earlier]})
            if earlier < turn:
                answer = self.answers[number, earlier].answer
                messages.append({"role": "assistant", "content": answer})
        return messages

    def _question(
        self, number: int, messages: list[dict[str, str]], turn: int
    ) -> tuple[Question, int]:
        room = max(1, self.max_new_tokens // 2)
        prompt = prompt_of(self._tokenizer, messages, positions=self._answerer.positions, room=room)
        item, asked = self._items[number], self._options.temperature
        temperature = item.temperature if asked is None else asked
        seed = seed_of(self._options.seed, item.key, turn)
        return (
            Question(prompt.token_ids, self.max_new_tokens, temperature, seed),
            prompt.dropped_turns,
        )

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True, compact=True),
            console=self._console,
            disable=not self._console.is_terminal,
        )


def _check(options: GenerateOptions) -> None:
    if options.form not in FORMATS:
        raise ConfigError(f"--format must be {' or '.join(FORMATS)}, found {options.form!r}")
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size must be at least 1, found {options.batch_size}")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, found {options.max_new_tokens}")
    if options.temperature is not None and not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature must be at least 0, found {options.temperature}")
    output = options.output
    if output.is_dir():
        raise ConfigError(f"--output: {output} is a folder; name a file")
    if output.exists() and not options.overwrite:
        raise ConfigError(f"--output: {output} exists; name another file, or give --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output: {output.parent}: {error.strerror}") from None
    if not os.access(output.parent, os.W_OK):
        raise ConfigError(f"--output: {output.parent} cannot be written")


def _made_of(
    target: Target, model: Any, items: list[Item], options: GenerateOptions, max_new_tokens: int
) -> dict[str, Any]:
    """What must be the same when a run goes on; not the batch size, which changes no answer."""
    prompts = hashlib.sha256(repr(items).encode("utf-8", "surrogatepass")).hexdigest()
    return {
        "format": options.form,
        "prompts": prompts,
        "model": weights_digest(model),
        "adapter": target.adapter is not None and not options.adapter_off,
        "max_new_tokens": max_new_tokens,
        "temperature": options.temperature
        if options.temperature is not None or options.form == MT_BENCH
        else 0.0,
        "seed": options.seed,
    }


def _write(options: GenerateOptions, items: list[Item], run: _Run, name: str) -> None:
    entries = [
        [run.answers[number, turn] for turn in range(len(item.turns))]
        for number, item in enumerate(items)
    ]
    answers = [[entry.answer for entry in turns] for turns in entries]
    stamps = [turns[-1].stamp for turns in entries]
    partial = options.output.with_name(f".{options.output.name}.new")
    try:
        write_answers(partial, options.form, items, answers, name, stamps)
        os.replace(partial, options.output)
    except OSError as error:
        raise CheckpointError(
            f"{options.output} cannot be written ({error.strerror}); the answers are kept beside "
            "it: the same command writes it"
        ) from error
