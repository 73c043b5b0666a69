"""A training that is asked to stop ends after the step that it is in, with a checkpoint.

Asked by a signal (Ctrl-C, what a system sends before it shuts down, a terminal that is closed) or
by the clock. All ranks stop after the same step.
"""

import contextlib
import signal
import threading
import time
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")  # the last: a terminal that is closed; not on Windows
# Of several ranks, a launcher hands a signal on that its ranks may have had from a terminal or a
# batch system already: what follows so soon is no second word.
_HANDED_ON_SECONDS = 2.0


class EvaluationCut(Exception):
    """Raised inside an evaluation during training, which a stop does not wait for."""


class StopWithCheckpoint(TrainerCallback):
    """Stops a training after its current step and has it saved, when a signal or the clock asks.

    A second signal stops at once, as if this was not there; with several ranks, one that comes two
    seconds later or more. Signals are listened to while the
    training runs, in the main thread.

    Args:
        seconds: stop after so long, counted from the beginning of the training; None: never.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self.reason: str | None = None
        """Why the training was stopped; None while it was not."""
        self.signal: int | None = None
        """The signal, where one was the reason."""
        self.has_stopped = False
        """Whether the training ended before its own end, with a checkpoint of its last step."""
        self._seconds = seconds
        self._ends_at: float | None = None
        self._asked_at = 0.0
        self._has_launcher = False
        self._handlers: dict[int, Any] = {}
        self._is_training = False
        self._is_silent = False
        self._is_stopping = False
        self._saves_next = False
        self._put_back: dict[str, Any] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Begin to listen."""
        self._is_training = True
        self._has_launcher = args.world_size > 1
        self._is_silent = args.process_index != 0
        if self._seconds is not None:
            self._ends_at = time.monotonic() + self._seconds
        if threading.current_thread() is threading.main_thread() and not self._handlers:
            for number in _numbers():
                self._handlers[number] = signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            if signal.Signals(number).name == "SIGHUP":
                return  # a shell sends it on to what the terminal has sent it to already
            if self._has_launcher and time.monotonic() - self._asked_at < _HANDED_ON_SECONDS:
                return
            self.stop_listening()
            signal.raise_signal(number)
            return
        self.signal = number
        self._asked_at = time.monotonic()
        self.reason = signal.Signals(number).name
        if self._is_silent:
            return
        # Nobody may be reading any more (`| tee log` has had the same Ctrl-C), or the signal came
        # in the middle of a print that waits.
        with contextlib.suppress(OSError, RuntimeError):
            what = "stopping after this step with a checkpoint; again to stop at once"
            print(f"\n{self.reason}: {what}")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop and save, if any rank was asked to and the training is not at its end anyway."""
        self._look_at_the_clock()
        if not _any_rank(self.reason is not None, args.device):
            return
        self.reason = self.reason or "another rank was asked to stop"
        if control.should_training_stop:
            return
        self._is_stopping = True
        # At the end of a training transformers would load the best checkpoint and delete the one
        # that is announced here; this is not the end. Nor is only the best one saved.
        for name, value in (("load_best_model_at_end", False), ("save_total_limit", None)):
            self._set_aside(args, name, value)
        if args.save_strategy == SaveStrategy.BEST:
            self._set_aside(args, "save_strategy", SaveStrategy.STEPS)
        ends_epoch = state.epoch is not None and float(state.epoch).is_integer()
        if not (
            ends_epoch
            and args.eval_strategy == IntervalStrategy.EPOCH
            and _depends_on_evaluations(args)
        ):
            self._save(control)

    def _look_at_the_clock(self) -> None:
        if self.reason is None and self._ends_at is not None and time.monotonic() >= self._ends_at:
            self.reason = "the time is over"

    def _save(self, control: Any) -> None:
        """Stop when that is done: an evaluation of this step may still end the training itself."""
        self._saves_next = control.should_save = True

    def _set_aside(self, args: Any, name: str, value: Any) -> None:
        self._put_back.setdefault(name, getattr(args, name))
        setattr(args, name, value)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """End the training here, unless an evaluation just ended it (early stopping)."""
        if not self._saves_next:
            return
        self._saves_next = self._is_stopping = False
        self.has_stopped = not control.should_training_stop
        control.should_training_stop = True
        if not self.has_stopped:
            self._put_args_back(args)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing of what comes at an epoch's end, unless it has ended and is waited for."""
        if self._is_stopping:
            self._save(control)
        elif self.has_stopped:
            control.should_evaluate = control.should_save = False

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Cut an evaluation that nothing of the training depends on.

        With several ranks it ends by itself, for they wait for each other.
        """
        self._look_at_the_clock()
        is_cut = self._is_training and self.reason is not None and args.world_size == 1
        if is_cut and not _depends_on_evaluations(args):
            self.has_stopped = True
            raise EvaluationCut

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Listen no longer."""
        self._is_training = False
        self._put_args_back(args)
        self.stop_listening()

    def _put_args_back(self, args: Any) -> None:
        for name, value in self._put_back.items():
            setattr(args, name, value)
        self._put_back = {}

    def stop_listening(self) -> None:
        """Give the signals back to whom they had."""
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}


def _numbers() -> list[int]:
    names = [name for name in _SIGNALS if hasattr(signal, name)]
    if names[-1] == "SIGHUP" and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        names.pop()  # nohup
    return [getattr(signal, name) for name in names]


def _depends_on_evaluations(args: Any) -> bool:
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    return (
        args.metric_for_best_model is not None
        or args.load_best_model_at_end
        or schedule in ("reduce_lr_on_plateau", "greedy")
    )


def _any_rank(asked: bool, device: torch.device) -> bool:
    if not (distributed.is_available() and distributed.is_initialized()):
        return asked
    flag = torch.tensor([int(asked)], device=device)
    distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
    return bool(flag.item())
