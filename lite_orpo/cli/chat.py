"""`lite-orpo chat`: a conversation in the terminal, with the adapter or beside its base model."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from ..config.yaml_file import Setting
from ..errors import ConfigError, DataError
from ..generation.answering import Answerer
from ..generation.conversation import Conversation, Reply, check_system
from ..model.adapter import adapter_switched_off
from .target import load_target_model, load_target_tokenizer, resolve_target
from .train import quiet_libraries

_COMMANDS = "/reset forgets what was said, /system TEXT sets a system message, /quit ends"


class ChatOptions(NamedTuple):
    """The options of the command; None: not given."""

    compare: bool
    system: str | None
    max_new_tokens: int
    temperature: float
    seed: int
    base: str | None


def run_chat(name: str, overrides: dict[str, Setting], options: ChatOptions) -> None:
    """Talk until the input ends.

    Args:
        name: a run's folder, an adapter, a model or a configuration.
        overrides: settings from the command line.
        options: the command's own.

    Raises:
        UserError: anything the user can mend, in one line.
    """
    console = Console()
    quiet_libraries(console)
    if options.max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens must be at least 1, found {options.max_new_tokens}")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature must be at least 0, found {options.temperature}")
    target = resolve_target(name, options.base, overrides)
    if options.compare and target.adapter is None:
        raise ConfigError(f"--compare: {target.name} has no adapter to switch off")
    tokenizer = load_target_tokenizer(target)
    check_system(tokenizer, options.system)
    model = load_target_model(target, is_scored=False)
    chat = _Chat(console, model, tokenizer, options)
    with_base = " beside its base" if options.compare else ""
    console.print(f"  {target.name}{with_base} · {_COMMANDS}", style="dim", highlight=False)
    if not tokenizer.chat_template:
        console.print(
            "  the tokenizer has no chat template: what you write is gone on with as plain text",
            style="dim",
        )
    chat.run()


class _Chat:
    def __init__(self, console: Console, model: Any, tokenizer: Any, options: ChatOptions) -> None:
        self._console = console
        self._model = model
        self._tokenizer = tokenizer
        self._has_said_dropped = False

        def conversation() -> Conversation:
            return Conversation(
                Answerer(model, tokenizer),
                tokenizer,
                system=options.system,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=options.seed,
            )

        self._system = options.system
        self._own = conversation()
        self._base = conversation() if options.compare else None

    def run(self) -> None:
        """Until /quit or the end of the input."""
        for line in self._lines():
            command, _, rest = line.strip().partition(" ")
            if not command:
                continue
            if command in ("/quit", "/exit"):
                return
            if command.startswith("/"):
                self._obey(command, rest.strip())
                continue
            try:
                self._answer(line.strip())
            except DataError as error:
                self._console.print(f"  {error}", style="yellow", highlight=False, markup=False)

    def _lines(self) -> Iterator[str]:
        is_typed = sys.stdin.isatty()
        if is_typed:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (arrow keys and history at the prompt)
        while True:
            try:
                line = input("\nyou> " if is_typed else "")
            except EOFError:
                if is_typed:
                    self._console.print()
                return
            except KeyboardInterrupt:
                # Meant for an answer that had just ended, it must not cost the conversation.
                self._console.print(
                    "\n  /quit, or the end of the input (Ctrl-D), ends", style="dim"
                )
                continue
            except UnicodeDecodeError:
                raise DataError("the input is no UTF-8 text") from None
            if not is_typed and line.strip():
                # What was read from a file or a pipe is not on the screen yet.
                self._console.print(Text(f"\nyou> {line}", style="bold"))
            yield line

    def _obey(self, command: str, rest: str) -> None:
        if command not in ("/reset", "/system"):
            self._console.print(f"  {command} is no command; {_COMMANDS}", markup=False)
            return
        if command == "/system":
            system = rest or None
            try:
                check_system(self._tokenizer, system)
            except DataError as error:
                self._console.print(f"  {error}", style="yellow", highlight=False, markup=False)
                return
            self._system = system
        for conversation in (self._own, self._base):
            if conversation is not None:
                conversation.begin_anew(self._system)
        said = "no system message" if self._system is None else f"system: {self._system}"
        self._console.print(f"  begun anew, {said}", style="dim", highlight=False, markup=False)

    def _answer(self, text: str) -> None:
        if self._base is None:
            reply = self._own.reply(text, self._tell)
            self._console.print()
            replies = [reply]
        else:
            replies = self._answer_both(text, self._base)
        if any(reply.was_stopped for reply in replies):
            self._console.print("  (stopped)", style="dim")
        if any(reply.dropped_turns for reply in replies) and not self._has_said_dropped:
            self._has_said_dropped = True
            self._console.print(
                "  the conversation is longer than the model's positions: its oldest turns are "
                "dropped from here on",
                style="dim",
            )

    def _tell(self, piece: str) -> None:
        self._console.print(Text(piece), end="", soft_wrap=True)
        self._console.file.flush()

    def _answer_both(self, text: str, base: Conversation) -> list[Reply]:
        parts = {"base (adapter off)": "", "adapter": ""}
        replies: list[Reply] = []
        # Elsewhere than on a terminal the finished panels are enough.
        shown = Live(console=self._console, auto_refresh=False, transient=True)
        is_live = self._console.is_terminal

        def ask(title: str, conversation: Conversation) -> None:
            def tell(piece: str) -> None:
                parts[title] += piece
                if is_live:
                    shown.update(self._panels(parts), refresh=True)

            replies.append(conversation.reply(text, tell))

        with shown if is_live else contextlib.nullcontext():
            with adapter_switched_off(self._model):
                ask("base (adapter off)", base)
            if not replies[0].was_stopped:
                ask("adapter", self._own)
        self._console.print(self._panels(parts))
        return replies

    def _panels(self, parts: dict[str, str]) -> Columns:
        width = max(20, self._console.width // 2)
        styles = ("red", "green")
        return Columns(
            [
                Panel(Text(text), title=title, title_align="left", border_style=style, width=width)
                for (title, text), style in zip(parts.items(), styles, strict=True)
            ],
            padding=0,
        )
