"""Kills a training process over and over while it saves; prints one JSON line for each kill.

    python tests/helpers/kill_saves.py FOLDER KILLS

Each child is forked from this process, trains a tiny model that saves after every step, and is killed at a random
moment after it began to write. What it leaves is checked, and the next child goes on from there.
"""

import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import Trainer, TrainingArguments

import attnswap
from attnswap.training import DurableCheckpoints, latest_checkpoint
from attnswap.training.durable import WRITING
from tests.helpers.training import tiny_llama

WAIT = 60.0


class Tokens(Dataset):
    def __len__(self) -> int:
        return 100_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = torch.randint(0, 200, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def train(folder: Path) -> None:
    model = tiny_llama()
    attnswap.patch(model, "ssmax")
    args = TrainingArguments(
        str(folder),
        max_steps=50_000,
        save_steps=1,
        save_total_limit=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
        per_device_train_batch_size=1,
    )
    trainer = Trainer(model=model, args=args, train_dataset=Tokens())
    trainer.add_callback(DurableCheckpoints(trainer))
    latest = latest_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if latest is None else str(latest))


def begun(aside: Path) -> bool:
    """Whether a file of a checkpoint has been written."""
    with suppress(FileNotFoundError):  # renamed while we look
        return any(path.is_file() for path in aside.rglob("*"))
    return False


def kill_one(folder: Path, chance: random.Random) -> bool:
    """Runs a child until it writes, kills it, and returns whether that was before the rename."""
    aside = folder / WRITING
    shutil.rmtree(aside, ignore_errors=True)
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        train(folder)
        os._exit(0)
    started = time.monotonic()
    skip = chance.randint(1, 4)  # not always the first checkpoint of a child
    while skip:
        while not aside.exists():
            assert time.monotonic() - started < WAIT, "the child never saved"
            time.sleep(0.0005)
        skip -= 1
        while skip and aside.exists():
            time.sleep(0.0005)
    while aside.exists() and not begun(aside):
        time.sleep(0.0002)
    time.sleep(chance.random() * 0.012)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return begun(aside)


def look(folder: Path) -> int:
    """Reads every checkpoint that is there, and returns the step of the latest."""
    latest = latest_checkpoint(folder)
    for checkpoint in folder.glob("checkpoint-*"):
        for file in checkpoint.rglob("*"):
            if file.suffix == ".safetensors":
                assert load_file(file)
            elif file.suffix in (".pt", ".pth") and "rng" not in file.name:
                torch.load(file, weights_only=True)
            elif file.suffix == ".json":
                json.loads(file.read_text())
    if latest is None:
        return 0
    attnswap.from_pretrained(str(latest))
    return int(latest.name.rpartition("-")[2])


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared with the children, which may be killed while they hold it
    chance = random.Random(0)
    for kill in range(kills):
        between = kill_one(folder, chance)
        print(json.dumps({"kill": kill, "between_write_and_rename": between, "latest": look(folder)}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
