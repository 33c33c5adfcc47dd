"""What keeps a run's work: whole checkpoints, exact resuming, a stop on SIGTERM, no step that is not finite."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import attnswap
from attnswap.errors import CheckpointError, NumericsError
from attnswap.training import RampSchedule, SkipNonFinite, latest_checkpoint, protect
from attnswap.training.durable import MARKER, REPLACED, WRITING
from tests.helpers.kill_saves import Tokens
from tests.helpers.paths import HELPERS, ROOT
from tests.helpers.training import tiny_llama


def trainer_of(
    folder: Path, swap: Any = "ssmax", callbacks: tuple = (), kind: Any = Trainer, **options: Any
) -> Trainer:
    model = tiny_llama(attention_dropout=0.0)
    attnswap.patch(model, swap)
    model.train()
    chosen = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2, "seed": 3} | options
    args = TrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=2,
        **chosen,
    )
    return kind(model=model, args=args, train_dataset=Tokens(), eval_dataset=Tokens(), callbacks=list(callbacks))


class At(TrainerCallback):
    """Does something before a step."""

    def __init__(self, act, *steps: int) -> None:
        self.act, self.steps = act, steps

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 in self.steps:
            self.act(kwargs["model"])


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- checkpoints


def test_only_whole_checkpoints_are_left(tmp_path):
    trainer = trainer_of(tmp_path, save_total_limit=2)
    protect(trainer)
    trainer.train()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    listed = json.loads((tmp_path / "checkpoint-6" / MARKER).read_text())["files"]
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "config.json"} <= listed.keys()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_the_best_checkpoint_stays(tmp_path):
    losses = {2: 1.0, 4: 3.0, 6: 2.0}

    class Judged(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": losses[self.state.global_step]}
            self.log(metrics)
            return metrics

    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = trainer_of(tmp_path, "softpick", (RampSchedule(6),), kind=Judged, **options)
    protect(trainer)
    trainer.train()
    best = tmp_path / "checkpoint-2"
    assert names(tmp_path) == ["checkpoint-2"]  # Trainer itself removes the last one at the end
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    saved = attnswap.from_pretrained(str(best))
    assert same(dict(saved.state_dict()), state(trainer))  # at the lambda of step 2


@pytest.mark.parametrize("damage", ["missing", "short", "marker"])
def test_a_damaged_checkpoint_is_passed_over_and_refused(damage, tmp_path):
    trainer = trainer_of(tmp_path)
    protect(trainer)
    trainer.train()
    newest = tmp_path / "checkpoint-6"
    file = newest / (MARKER if damage == "marker" else "optimizer.pt")
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-30])
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    again = trainer_of(tmp_path)
    protect(again)
    before = state(again)
    with pytest.raises(CheckpointError, match="incomplete"):
        again.train(resume_from_checkpoint=str(newest))
    assert same(state(again), before)


def test_an_interrupted_replacement_is_put_back(tmp_path):
    trainer = trainer_of(tmp_path)
    protect(trainer)
    trainer.train()
    os.replace(tmp_path / "checkpoint-6", tmp_path / f"{REPLACED}checkpoint-6")
    (tmp_path / WRITING).mkdir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def kills(folder: Path, number: int) -> list[dict[str, Any]]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(HELPERS / "kill_saves.py"), str(folder), str(number)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == number
    latest = [line["latest"] for line in lines]
    assert latest == sorted(latest) and latest[-1] > 0  # nothing that was complete is ever lost
    return lines


def test_killed_while_saving(tmp_path):
    assert any(line["between_write_and_rename"] for line in kills(tmp_path, 6))


@pytest.mark.slow
def test_killed_fifty_times_while_saving(tmp_path):
    assert sum(line["between_write_and_rename"] for line in kills(tmp_path, 50)) >= 30


# --- resuming


@pytest.mark.parametrize("swap", ["softpick", "forgetting-gate"])
def test_resuming_is_bitwise(swap, tmp_path):
    """Ten and ten steps give the bits of twenty: weights, optimizer, random numbers, order of data, lambda."""

    def run(folder: Path, resume: str | None = None, stop_at: int | None = None) -> tuple[dict, list]:
        def draw(model: Any) -> None:
            seen.append((float(torch.rand(())), [round(s, 6) for s in ramp(model)]))

        def ramp(model: Any) -> list[float]:
            return [float(b) for n, b in model.named_buffers() if n.endswith("ramp")]

        def end(model: Any) -> None:
            trainer.control.should_training_stop = True

        seen: list = []
        callbacks = [RampSchedule(15), At(draw, *range(1, 21))]
        trainer = trainer_of(folder, swap, tuple(callbacks), max_steps=20, save_steps=10, warmup_steps=3)
        trainer.model.config.attention_dropout = 0.0
        protect(trainer)
        if stop_at is not None:
            trainer.add_callback(At(end, stop_at))
        trainer.train(resume_from_checkpoint=resume)
        losses = [(x["step"], x["loss"]) for x in trainer.state.log_history if "loss" in x]
        return state(trainer), [seen, losses]

    whole, (drawn, losses) = run(tmp_path / "whole")
    _, (first, _) = run(tmp_path / "parts", stop_at=10)
    parts, (second, resumed) = run(tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-10"))
    assert same(whole, parts)
    assert first + second == drawn
    assert len(drawn) == 20 and resumed == losses


def test_resuming_at_the_end_takes_no_further_step(tmp_path):
    """A run that is killed between its last step and its end."""
    trainer = trainer_of(tmp_path, "softpick", (RampSchedule(lambda step: step / 10),))
    protect(trainer)
    trainer.train()
    again = trainer_of(tmp_path, "softpick", (RampSchedule(lambda step: step / 10),))
    protect(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.state.global_step == 6
    assert same(state(again), state(trainer))


def test_resuming_needs_the_same_swaps(tmp_path):
    trainer = trainer_of(tmp_path)
    protect(trainer)
    trainer.train()
    other = trainer_of(tmp_path, "softpick")
    protect(other)
    with pytest.raises(CheckpointError, match="do not have the same swap"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


# --- SIGTERM


def test_sigterm_saves_and_ends(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    trainer = trainer_of(tmp_path, callbacks=(At(lambda model: os.kill(os.getpid(), signal.SIGTERM), 3),))
    protection = protect(trainer)
    trainer.train()
    assert trainer.state.global_step == 3
    assert protection.stop.received is signal.SIGTERM
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    assert signal.getsignal(signal.SIGTERM) is before
    again = trainer_of(tmp_path)
    protect(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    through = trainer_of(tmp_path / "through")
    through.train()
    assert same(state(again), state(through))


# --- what is not finite


def poison(model: Any) -> None:
    """Makes head 2 of layer 1 give nan."""
    model.model.layers[1].self_attn.attnswap.sigmoid.bias.data[2] = torch.nan


def test_a_step_that_is_not_finite_leaves_every_weight(tmp_path):
    """At step 3 the loss is nan, at step 5 one gradient: after both, weights and moments are what they were."""
    kept: dict[int, list] = {}

    class Injects(Trainer):
        def training_step(self, model, inputs, *args):
            loss = super().training_step(model, inputs, *args)
            step = self.state.global_step + 1
            kept[step] = [state(self), [{k: v.clone() for k, v in s.items()} for s in self.optimizer.state.values()]]
            if step == 5:
                next(iter(model.parameters())).grad[0, 0] = torch.inf
            return loss

    class Spoils(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            self.hook = (
                model.lm_head.register_forward_hook(lambda m, i, o: o * torch.nan) if state.global_step == 2 else None
            )

        def on_step_end(self, args, state, control, model, **kwargs):
            if self.hook:
                self.hook.remove()

    trainer = trainer_of(tmp_path, callbacks=(Spoils(),), kind=Injects, weight_decay=0.1)
    protection = protect(trainer)
    trainer.train()
    assert protection.finite.skipped == [3, 5]
    for bad in (3, 5):
        assert same(kept[bad][0], kept[bad + 1][0])
        for before, after in zip(kept[bad][1], kept[bad + 1][1], strict=True):
            assert all(torch.equal(before[k], after[k]) for k in before)
    assert not same(kept[1][0], kept[2][0])
    assert trainer.state.log_history[-2]["skipped_steps"] == [3, 5]

    resumed = trainer_of(tmp_path, max_steps=8)
    protection = protect(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert protection.finite.skipped == [3, 5]


def test_the_third_in_a_row_ends_the_run_and_says_where_it_began(tmp_path):
    trainer = trainer_of(tmp_path, {"name": "sigmoid", "bias": "learned"}, (At(poison, 2),))
    protect(trainer)
    where = r"3 steps in a row \(2, 3, 4\).*first in the output of layer 1, head 2 \(swap: sigmoid\)"
    with pytest.raises(NumericsError, match=where):
        trainer.train()
    found = json.loads((tmp_path / "nonfinite-step-4.json").read_text())
    assert found["first"] == {"layer": 1, "where": "output", "heads": [2], "swap": ["sigmoid"]}
    assert "query" not in found["layers"]["1"] and found["layers"]["0"].keys() <= {
        "gradient of the output",
        "gradient of the query",
    }
    weights = {n: p for n, p in trainer.model.named_parameters() if "attnswap" not in n}
    assert all(torch.isfinite(p).all() for p in weights.values())


def test_a_gradient_that_is_lost_on_the_way_back(tmp_path):
    """Forward all is finite; the gradient of one head's output is not."""

    def spoil(model: Any) -> None:
        def back(g: torch.Tensor) -> torch.Tensor:
            g = g.clone()
            g[..., 8:16] = torch.nan  # of head 1
            return g

        model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
            lambda m, args: args[0].register_hook(back) and None
        )

    trainer = trainer_of(tmp_path, callbacks=(At(spoil, 2),))
    protect(trainer)
    with pytest.raises(NumericsError, match=r"gradient of the output of layer 0, head 1 \(swap: ssmax\)"):
        trainer.train()


def test_two_bad_steps_and_a_good_one_start_the_count_anew(tmp_path):
    def spoil(model: Any) -> None:
        hook = model.lm_head.register_forward_hook(lambda m, i, o: (hook.remove(), o * torch.nan)[1])

    trainer = trainer_of(tmp_path, callbacks=(At(spoil, 1, 2, 4, 5),))
    finite = SkipNonFinite()
    trainer.add_callback(finite)
    trainer.train()
    assert finite.skipped == [1, 2, 4, 5]
    assert not list(tmp_path.glob("nonfinite*"))


def test_accumulated_steps_are_left_out_as_a_whole(tmp_path):
    calls = []

    def spoil(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        calls.append(None)
        return output * torch.nan if len(calls) == 3 else None  # the first of the second step

    trainer = trainer_of(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    trainer.model.lm_head.register_forward_hook(spoil)
    finite = protect(trainer).finite
    trainer.train()
    assert finite.skipped == [2]


# --- in a trainer of another library


def test_in_trl(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from attnswap import AttnSwapConfig
    from tests.helpers.training import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "</s>"
    data = Dataset.from_dict({"text": [f"line {i} of a few words" for i in range(40)]})

    def make(folder: Path, *callbacks: TrainerCallback) -> SFTTrainer:
        args = SFTConfig(
            output_dir=str(folder),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=2,
            use_cpu=True,
            bf16=False,
            report_to="none",
            max_length=32,
            learning_rate=1e-2,
            disable_tqdm=True,
        )
        torch.manual_seed(0)
        return SFTTrainer(
            model=tiny_llama(),
            args=args,
            train_dataset=data,
            processing_class=tokenizer,
            peft_config=AttnSwapConfig(swap="softpick", ramp=0.5, r=2, target_modules=["q_proj"]),
            callbacks=list(callbacks),
        )

    whole = make(tmp_path / "a", RampSchedule(6))
    protect(whole)
    whole.train()
    assert attnswap.describe(whole.model.get_base_model()).patched_layers == [0, 1]
    stopped = make(tmp_path / "b", RampSchedule(6), At(lambda model: os.kill(os.getpid(), signal.SIGTERM), 4))
    protect(stopped)
    stopped.train()
    assert latest_checkpoint(tmp_path / "b") == tmp_path / "b" / "checkpoint-4"
    shutil.rmtree(tmp_path / "b" / "checkpoint-3")
    resumed = make(tmp_path / "b", RampSchedule(6))
    protect(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4"))
    assert same(state(whole), state(resumed))


def test_a_new_run_in_a_folder_with_old_checkpoints_keeps_its_own(tmp_path):
    (tmp_path / "checkpoint-1000").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    trainer = trainer_of(tmp_path, save_total_limit=1)
    protect(trainer)
    trainer.train()
    assert (tmp_path / "checkpoint-6").is_dir()
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-6"


def test_sigterm_in_the_last_step_changes_nothing(tmp_path):
    trainer = trainer_of(tmp_path, callbacks=(At(lambda model: os.kill(os.getpid(), signal.SIGTERM), 6),))
    stop = protect(trainer).stop
    trainer.train()
    assert stop.step is None and trainer.state.global_step == 6


@pytest.mark.parametrize("strategy", ["best", "epoch"])
def test_sigterm_with_other_ways_to_save(strategy, tmp_path):
    twice = At(lambda model: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)], 4)
    options = {"eval_strategy": "steps", "eval_steps": 2} if strategy == "best" else {}
    options |= {"metric_for_best_model": "eval_loss"} if strategy == "best" else {}
    trainer = trainer_of(tmp_path, callbacks=(twice,), save_strategy=strategy, **options)
    trainer.evaluate = lambda *args, **kwargs: {"eval_loss": 1.0}
    stop = protect(trainer).stop
    trainer.train()
    assert stop.step == 4
    assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint-4"


def test_models_without_swaps_are_protected_too(tmp_path):
    def spoil(model: Any) -> None:
        hook = model.lm_head.register_forward_hook(lambda m, i, o: (hook.remove(), o * torch.nan)[1])

    trainer = trainer_of(tmp_path, callbacks=(At(spoil, 2),))
    attnswap.unpatch(trainer.model)
    finite = protect(trainer).finite
    trainer.train()
    assert finite.skipped == [2]
