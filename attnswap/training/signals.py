"""Stop between two steps when asked to: by SIGTERM, as cluster schedulers do before they kill."""

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from attnswap.distributed import all_reduce_max


class StopOnSignal(TrainerCallback):
    """On SIGTERM finishes the step, saves a checkpoint and ends training.

    In a run of several processes it is enough that one of them gets the signal. Launchers and schedulers often send it
    twice, so until training has ended repeats change nothing.

    Args:
        signals: What to listen to.

    Attributes:
        received: The signal that came, or None.
        step: The step after which training ended for it.
    """

    def __init__(self, signals: tuple[signal.Signals, ...] = (signal.SIGTERM,)) -> None:
        self.signals = signals
        self.received: signal.Signals | None = None
        self.step: int | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._limit: int | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begins to listen, where Python lets us: in the main thread."""
        self.received, self.step = None, None
        if threading.current_thread() is threading.main_thread():
            self._before = {one: signal.signal(one, self._hear) for one in self.signals}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Ends training if any process was asked to."""
        number = all_reduce_max(int(self.received or 0), args.device)
        if number and state.global_step < state.max_steps:  # else it ends by itself
            self.received, self.step = signal.Signals(number), state.global_step
            control.should_save = control.should_training_stop = control.should_log = True
            control.should_evaluate = False  # there may not be time, and "best" would decide whether to save
            # With a limit of one, Trainer ends by removing all but the best checkpoint, this one included.
            self._limit, args.save_total_limit = args.save_total_limit, None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Gives the signals back."""
        if self.step is not None:
            args.save_total_limit = self._limit
        self.restore()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def restore(self) -> None:
        """Gives the signals back; done at the end of training, and to be done where that raises."""
        for one, before in self._before.items():
            signal.signal(one, before)
        self._before = {}
