"""Runs of several processes: the losses of one process, whole checkpoints, and a resume on fewer."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import attnswap
from attnswap import distributed
from attnswap.errors import NumericsError
from attnswap.evaluation import evaluate_perplexity
from attnswap.training import latest_checkpoint, parse_config, train
from tests.helpers.tiny_models import tiny
from tests.helpers.training import accelerate, byte_tokenizer, logged, recipe, spawn

IDS = torch.arange(4, 60)[None]
STEPS = 20


def launch(processes: int, engine: str, path: Path, *overrides: str, stop_at: int | None = None) -> Any:
    environment = {} if stop_at is None else {"STOP_AT": str(stop_at)}
    done = accelerate(processes, "tests/helpers/distributed_training.py", engine, str(path), *overrides, **environment)
    assert stop_at is not None or done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count(f"weights are {'Tensor' if engine == 'ddp' else 'DTensor'}") == processes
    return done


def write(tmp_path: Path, swap: Any, **training: Any) -> Path:
    chosen = {
        "max_steps": STEPS,
        "eval_strategy": "no",
        "save_strategy": "no",
        "lr_scheduler_type": "linear",
    } | training
    # Short windows, so that no epoch ends: its last batches are other ones for other numbers of processes.
    values = recipe(tmp_path, swap=swap, training=chosen, data={"sequence_length": 12, "eval_fraction": 0.05})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return attnswap.from_pretrained(str(folder))(IDS).logits


CASES = [
    pytest.param("ddp", 2, "forgetting-gate", {}, marks=pytest.mark.slow),
    pytest.param("fsdp2", 2, "forgetting-gate", {}),
    pytest.param("ddp", 4, "ssmax", {}, marks=pytest.mark.slow),
    pytest.param("fsdp2", 4, "ssmax", {}, marks=pytest.mark.slow),
    # At softpick's kinks a rounding can turn a gradient around, which a high learning rate makes more of.
    pytest.param(
        "fsdp2", 2, "softpick", {"gradient_checkpointing": True, "learning_rate": 2e-3}, marks=pytest.mark.slow
    ),
    pytest.param(
        "ddp",
        2,
        "softpick",
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
            "learning_rate": 2e-3,
        },
        marks=pytest.mark.slow,
    ),
    pytest.param("fsdp2", 2, "sigmoid", {"gradient_accumulation_steps": 2}, marks=pytest.mark.slow),
    pytest.param("fsdp2", 4, "selective-temperature", {}, marks=pytest.mark.slow),
    pytest.param("fsdp2", 2, "forgetting-gate", {"bf16": True}, marks=pytest.mark.slow),
    pytest.param("fsdp2 checkpointing", 2, "forgetting-gate", {}, marks=pytest.mark.slow),
    pytest.param("ddp", 2, "ssmax", {"bf16": True}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("engine", "processes", "swap", "training"), CASES)
def test_the_losses_of_one_process(engine, processes, swap, training, tmp_path):
    """Twenty steps on the same global batch."""
    path = write(tmp_path, swap, per_device_train_batch_size=4, **training)
    single = train(parse_config(yaml.safe_load(path.read_text())))
    share = 4 // processes
    launch(processes, engine, path, f"training.per_device_train_batch_size={share}", f"output_dir={tmp_path}/many")
    summary = json.loads((tmp_path / "many" / "summary.json").read_text())
    assert summary["processes"] == processes
    assert summary["windows_per_step"] == single.summary["windows_per_step"]
    one, many = logged(single.output_dir, "loss"), logged(tmp_path / "many", "loss")
    assert len(one) == len(many) == STEPS
    half = training.get("bf16", False)  # which rounds batches of other shapes otherwise, and more so with every step
    first = list(zip(one, many, strict=True))[: 5 if half else STEPS]
    assert max(abs(a - b) for a, b in first) <= (3e-2 if half else 1e-5)
    assert one[-1] < one[0] - 0.1 and many[-1] < many[0] - 0.1
    if not half:
        torch.testing.assert_close(logits(tmp_path / "many"), logits(single.output_dir), atol=1e-3, rtol=0)


def staged(tmp_path: Path) -> Path:
    path = write(tmp_path, "softpick", per_device_train_batch_size=4, max_steps=8, learning_rate=2e-3)
    values = yaml.safe_load(path.read_text())
    losses = {"outputs": {"transfer": 1.0, "ce": 0.0}, "logits": {"kl": 1.0, "ce": 0.0}, "text": {"ce": 1.0}}
    values["stages"] = [
        {"name": name, "share": share, "loss": loss, "train": "attention"}
        for (name, loss), share in zip(losses.items(), (0.5, 0.25, 0.25), strict=True)
    ]
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_stages_train_what_they_train_in_one_process(tmp_path):
    """Attention moves as in one process, but for what a mean over fewer windows makes of it; the rest not at all."""
    path = staged(tmp_path)
    single = train(parse_config(yaml.safe_load(path.read_text())))
    launch(2, "ddp", path, "training.per_device_train_batch_size=2", f"output_dir={tmp_path}/many")
    one, many = logged(single.output_dir, "loss"), logged(tmp_path / "many", "loss")
    assert len(one) == len(many) == 8
    assert many == pytest.approx(one, rel=0.1)
    assert many[3] < 0.6 * many[0]
    before = load_file(tmp_path / "model" / "model.safetensors")
    after = load_file(tmp_path / "many" / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".self_attn." in name for name in moved)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_processes_begin_where_the_first_one_fitted(engine, tmp_path):
    path = write(tmp_path, {"name": "sigmoid", "bias": "predicted"}, max_steps=4, per_device_train_batch_size=2)
    values = yaml.safe_load(path.read_text()) | {"fit": {"tokens": 200}, "ramp": 1.0}
    path.write_text(yaml.safe_dump(values))
    single = train(parse_config(values))
    done = launch(2, engine, path, "training.per_device_train_batch_size=1", f"output_dir={tmp_path}/many")
    told = re.findall(r"fitted to (\S+)", done.stdout)
    assert len(told) == 2 and told[0] == told[1]
    one, many = (load_file(folder / "fitted.safetensors") for folder in (single.output_dir, tmp_path / "many"))
    assert one.keys() == many.keys()
    assert all(torch.allclose(many[name], one[name], atol=2e-3) for name in one), "but for the rounding of its steps"
    losses = [logged(folder, "loss") for folder in (single.output_dir, tmp_path / "many")]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.slow
def test_an_experiment_runs_by_two_processes_from_end_to_end(tmp_path):
    path = staged(tmp_path)
    text = tmp_path / "held-out.txt"
    text.write_text("the dog lay on the floor. " * 60)
    words = ["heal", str(path), "training.per_device_train_batch_size=2", f"output_dir={tmp_path}/many"]
    words += ["--text", str(text), "--contexts", "32,96", "--max-tokens", "500", "--dtype", "fp32", "--device", "cpu"]
    done = accelerate(2, "--module", "attnswap.cli", *words)
    assert done.returncode == 0, done.stderr[-6000:]
    result = json.loads((tmp_path / "many" / "result" / "result.json").read_text())
    for name in ("healed", "control"):
        summary = json.loads((tmp_path / "many" / name / "summary.json").read_text())
        assert (summary["processes"], summary["windows_per_step"]) == (2, 4)
    alone = evaluate_perplexity(
        attnswap.from_pretrained(str(tmp_path / "many" / "healed")), byte_tokenizer(), text=text.read_text(),
        contexts=(32, 96), max_tokens=500, quiet=True,
    )  # fmt: skip
    assert [entry["perplexity"]["healed"] for entry in result["contexts"]] == [alone.at(n).ppl for n in (32, 96)]

    assert spawn("-m", "attnswap.cli", *words).returncode == 0, "nothing is left to train"
    shutil.rmtree(tmp_path / "many" / "control")
    refused = spawn("-m", "attnswap.cli", *words)
    assert refused.returncode == 2
    assert "on 4 windows per step, and its control would be on 2" in " ".join(refused.stderr.split())
    again = accelerate(2, "--module", "attnswap.cli", *words)
    assert again.returncode == 0, again.stderr[-6000:]


@pytest.mark.slow
def test_the_best_weights_of_a_sharded_run_are_those_of_one_process(tmp_path):
    """As the recipes run: evaluated and saved now and then, the best checkpoint loaded at the end."""
    often = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 5, "save_steps": 5}
    path = write(tmp_path, "ssmax", per_device_train_batch_size=4, **often)
    single = train(parse_config(yaml.safe_load(path.read_text())))
    launch(2, "fsdp2", path, "training.per_device_train_batch_size=2", f"output_dir={tmp_path}/many")
    summary = json.loads((tmp_path / "many" / "summary.json").read_text())
    assert summary["best_step"] == single.summary["best_step"]
    assert summary["held_out_loss"] == pytest.approx(single.summary["held_out_loss"], abs=1e-4)
    torch.testing.assert_close(logits(tmp_path / "many"), logits(single.output_dir), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_layers_that_are_sharded_cannot_learn_one_by_one(tmp_path):
    path = staged(tmp_path)
    done = accelerate(2, "tests/helpers/distributed_training.py", "fsdp2", str(path), f"output_dir={tmp_path}/many")
    assert done.returncode != 0
    assert "launch such stages with DDP" in done.stderr
    assert not (tmp_path / "many").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "first", "second"), [("fsdp2", 4, 2), ("ddp", 4, 2), ("fsdp2", 2, 2)])
def test_a_checkpoint_resumes_on_other_numbers_of_processes(engine, first, second, tmp_path):
    """Ten steps, then ten more on fewer processes, end where twenty on one process do."""
    options = {"save_strategy": "steps", "save_steps": 5, "save_total_limit": 2, "per_device_train_batch_size": 4}
    path = write(tmp_path, "forgetting-gate", **options)
    single = train(parse_config(yaml.safe_load(path.read_text())))
    out, size = f"output_dir={tmp_path}/many", "training.per_device_train_batch_size"
    stopped = launch(first, engine, path, f"{size}={4 // first}", out, stop_at=10)
    assert stopped.returncode != 0 and "stopped by SIGTERM after step 10" in stopped.stderr
    partial = tmp_path / "many.partial"
    assert latest_checkpoint(partial) == partial / "checkpoint-10"
    assert sorted(path.name for path in partial.glob("*checkpoint*")) == ["checkpoint-10", "checkpoint-5"]
    launch(second, engine, path, f"{size}={4 // second}", out, "training.resume_from_checkpoint=latest")
    one, many = logged(single.output_dir, "loss"), logged(tmp_path / "many", "loss")
    assert len(many) == STEPS
    assert max(abs(a - b) for a, b in zip(one, many, strict=True)) <= 1e-5
    torch.testing.assert_close(logits(tmp_path / "many"), logits(single.output_dir), atol=1e-3, rtol=0)


@pytest.mark.slow
def test_evaluation_over_two_processes(tmp_path):
    """The report is that of one process, to the last bit of every loss."""
    path = write(tmp_path, "softpick", max_steps=2)
    trained = train(parse_config(yaml.safe_load(path.read_text()))).output_dir
    text = tmp_path / "text.txt"
    options = [
        "eval",
        str(trained),
        "--contexts",
        "32,64",
        "--text",
        str(text),
        "--max-tokens",
        "512",
        "--device",
        "cpu",
    ]
    for name in ("one", "two"):
        command = [*options, "--out", str(tmp_path / name)]
        if name == "one":
            done = spawn("-m", "attnswap.cli", *command)
        else:
            done = accelerate(2, "--module", "attnswap.cli", *command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("64") >= 1
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one["metrics"] == two["metrics"]


def test_what_is_not_finite_in_one_process_ends_the_measurement_in_all(monkeypatch):
    """Or those that go on would take what another sends of the next model for the rest of this one."""
    told = []

    def gather(mine, count):
        told.append(mine)
        return {0: "lost in window 3"} | mine

    monkeypatch.setattr(distributed, "rank_and_world_size", lambda: (1, 2))
    monkeypatch.setattr(distributed, "all_gather_dicts", gather)
    with pytest.raises(NumericsError, match="window 3"), distributed.raise_on_all_ranks():
        pass
    with pytest.raises(NumericsError), distributed.raise_on_all_ranks():
        raise NumericsError("window 4")
    assert told == [{}, {1: "window 4"}]
    monkeypatch.setattr(distributed, "all_gather_dicts", lambda mine, count: mine)
    with distributed.raise_on_all_ranks():
        pass


@pytest.mark.slow
def test_tensor_parallelism_computes_the_swap_or_refuses(tmp_path):
    """Two processes with half of the heads each; a swap without tensors works, all else raises."""
    cases = {
        "softpick": ({"swap": "softpick"}, "differs by"),
        "ssmax": ({"swap": "ssmax"}, "ConfigError"),
        "forgetting-gate": ({"swap": "forgetting-gate"}, "ConfigError"),
        "chosen-heads": ({"swap": "softpick", "heads": [0, 1]}, "UnsupportedModelError: .*tensor parallelism"),
    }
    for name, (options, _) in cases.items():
        model = tiny("llama")
        attnswap.patch(model, **options)
        model.save_pretrained(tmp_path / name)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = spawn(*launch, "tests/helpers/tensor_parallel_forward.py", str(tmp_path), *cases)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (_, outcome) in cases.items():
        lines = [line.removeprefix(f"{name} ") for line in done.stdout.splitlines() if line.startswith(f"{name} ")]
        assert len(lines) == 2 and all(re.match(outcome, line) for line in lines), lines
        if outcome == "differs by":
            assert all(float(line.rpartition(" ")[2]) < 1e-5 for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_low_rank_adapters_of_a_recipe(engine, tmp_path):
    """They are trained beside the swap and merged in the end, sharded or not."""
    path = write(tmp_path, "ssmax", per_device_train_batch_size=4)
    values = yaml.safe_load(path.read_text()) | {"lora": {"r": 4, "alpha": 8, "target_modules": ["q_proj", "v_proj"]}}
    path.write_text(yaml.safe_dump(values))
    single = train(parse_config(values))
    launch(2, engine, path, "training.per_device_train_batch_size=2", f"output_dir={tmp_path}/many")
    one, many = logged(single.output_dir, "loss"), logged(tmp_path / "many", "loss")
    assert max(abs(a - b) for a, b in zip(one, many, strict=True)) <= 1e-5
    torch.testing.assert_close(logits(tmp_path / "many"), logits(single.output_dir), atol=1e-3, rtol=0)
