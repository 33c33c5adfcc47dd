"""One process of a training run: python tests/helpers/distributed_training.py ENGINE RECIPE [key=value ...].

ENGINE is "ddp", "fsdp2" or "fsdp2 checkpointing". accelerate offers FSDP2 where there are accelerators only; torch's
shards on a CPU just as well, so this lets accelerate take the processes for ones with a GPU.
"""

import os
import signal
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import TrainerCallback

import attnswap
from attnswap.cli import main as cli
from attnswap.training import run


def with_callback(callback: TrainerCallback) -> None:
    """Adds a callback to the trainer that the run makes."""
    protect = run.protect

    def protected(trainer):
        trainer.add_callback(callback)
        return protect(trainer)

    run.protect = protected


def tell_fit() -> None:
    """Makes each process print what its swaps start from once they are fitted."""
    fit = run.fit_swaps

    def fitted(model, *args):
        fit(model, *args)
        total = sum(float(p.double().square().sum()) for p in attnswap.swap_parameters(model).values())
        os.write(1, f"fitted to {total!r}\n".encode())

    run.fit_swaps = fitted


class StopAt(TrainerCallback):
    """Lets this process get SIGTERM in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


class TellEngine(TrainerCallback):
    """Prints how the weights are kept when training ends."""

    def on_train_end(self, args, state, control, **kwargs):
        kinds = {type(p.data).__name__ for p in kwargs["model"].parameters()}
        os.write(1, f"weights are {' '.join(sorted(kinds))}\n".encode())  # whole, beside those of others


def main() -> None:
    engine, sys.argv[1:] = sys.argv[1], sys.argv[2:]
    state = PartialState(cpu=True)
    if engine != "ddp":
        os.environ |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
            "FSDP_ACTIVATION_CHECKPOINTING": str(engine.endswith("checkpointing")).lower(),
        }
        create = AcceleratorState.__init__

        def with_accelerators(self, *args, **kwargs):
            PartialState().distributed_type = DistributedType.MULTI_GPU
            create(self, *args, **kwargs)

        AcceleratorState.__init__ = with_accelerators
    if "STOP_AT" in os.environ and state.process_index == 0:
        with_callback(StopAt(int(os.environ["STOP_AT"])))
    with_callback(TellEngine())
    tell_fit()
    sys.argv.insert(1, "train")
    try:
        cli()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    else:
        code = 0
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # gloo's threads may abort a process on a loaded machine while Python tears it down


if __name__ == "__main__":
    main()
