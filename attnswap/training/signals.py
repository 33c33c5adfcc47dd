"""Stop training between two steps on SIGTERM, which cluster schedulers send before they kill a job."""

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attnswap.distributed import all_reduce_max


class StopOnSignal(TrainerCallback):
    """Finishes the current step on SIGTERM, saves a checkpoint and ends training.

    In a run of several processes it is enough that one of them receives the signal. Launchers and schedulers often send
    it twice; further signals have no effect until training has ended.

    Args:
        signals: The signals to handle.

    Attributes:
        received: The received signal, or None.
        step: The step after which training ended because of it, or None.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)) -> None:
        self.signals = signals
        self.received: signal.Signals | None = None
        self.step: int | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._limit: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Installs the signal handlers. Python allows this in the main thread only."""
        self.received, self.step = None, None
        if threading.current_thread() is threading.main_thread():
            self._previous = {one: signal.signal(one, self._handle) for one in self.signals}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends training if any process has received a signal."""
        number = all_reduce_max(int(self.received or 0), args.device)
        if number and state.global_step < state.max_steps:  # after the last step, training ends anyway
            self.received, self.step = signal.Signals(number), state.global_step
            control.should_save = control.should_training_stop = control.should_log = True
            control.should_evaluate = False  # there may be no time for it, and its result might prevent the save
            # With a limit of one, Trainer would at the end remove all checkpoints but the best, including this one.
            self._limit, args.save_total_limit = args.save_total_limit, None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Restores the previous signal handlers."""
        if self.step is not None:
            args.save_total_limit = self._limit
        self.restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def restore(self) -> None:
        """Restores the previous signal handlers. Call it if training raises; otherwise it is called at the end."""
        for one, previous in self._previous.items():
            signal.signal(one, previous)
        self._previous = {}
