"""The measurements of an experiment, kept in files so that none is taken twice."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

import attnswap
from attnswap.devices import default_device
from attnswap.distributed import init_process_group, rank_and_world_size
from attnswap.errors import CheckpointError, ConfigError
from attnswap.evaluation import Evaluation, evaluate_perplexity
from attnswap.evaluation.bootstrap import check_comparable
from attnswap.evaluation.fidelity import measure_fidelity
from attnswap.evaluation.result import write_atomically
from attnswap.evaluation.structure import measure_structure
from attnswap.healing.experiment import Experiment
from attnswap.loading import load_model
from attnswap.training.movement import start_from
from attnswap.visible import visible


class Bench:
    """Measures models and keeps what was measured in files."""

    def __init__(self, experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> None:
        self.experiment, self.tokenizer = experiment, tokenizer
        self._first: Evaluation | None = None
        self.longest = max(experiment.contexts)
        self.digest = experiment.text_sha256
        self.device = experiment.device or init_process_group(None) or default_device()

    def load(self, reference: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Returns a model on the device where it is measured."""
        return load_model(reference, dtype=dtype, device=self.device)

    def unhealed(self, dtype: torch.dtype = torch.float32, fitted: Path | None = None) -> PreTrainedModel:
        """Returns the model with the recipe's swap and no training, or as far as training was told where to start."""
        config = self.experiment.config
        model = load_model(config.model.reference, dtype=dtype)
        assert config.swap is not None
        # Gates may start from noise: the same as in training, which patches on the CPU, too.
        set_seed(self.experiment.seed)
        attnswap.patch(model, config.swap, part=config.part, layers=config.layers, heads=config.heads)
        if fitted is not None:
            start_from(model, fitted)
        return model.to(device=self.device)  # type: ignore[call-arg, no-any-return]

    def losses(self, path: Path, load: Any, *, bypass: bool = False) -> Evaluation:
        """Measures perplexity at all contexts.

        Args:
            path: Where what was measured is kept, by folder and name.
            load: Returns the model in the dtype it is given.
            bypass: Pass its swaps by.
        """
        file = path.with_name(f"{path.name}-losses.json")
        found = self._known(file)
        if found is None:
            say(f"measuring {path.name}")
            model = load(dtype=self.experiment.dtype)
            with attnswap.bypassed(model) if bypass else nullcontext():
                found = evaluate_perplexity(
                    model,
                    self.tokenizer,
                    text=self.experiment.text,
                    contexts=self.experiment.contexts,
                    max_tokens=self.experiment.max_tokens,
                    positions=False,
                    baseline=self._first,
                    model_id=path.name,
                    corpus_id=self.experiment.text_id,
                    quiet=not sys.stderr.isatty(),
                )
            if rank_and_world_size()[0] == 0:
                found.save(file)
        self._first = self._first or found
        return found

    def _known(self, file: Path) -> Evaluation | None:
        if not file.is_file():
            return None
        found = Evaluation.load(file)
        dtype = str(self.experiment.dtype).removeprefix("torch.")
        if found.protocol.contexts != tuple(sorted(self.experiment.contexts)) or found.env["dtype"] != dtype:
            return None
        if self._first is not None:
            try:
                check_comparable(found.protocol, self._first.protocol)
            except ConfigError:
                return None
            return found
        scored, wanted = found.protocol.scored_tokens, self.experiment.max_tokens
        whole = scored < wanted and found.protocol.end == found.corpus["tokens"]
        return found if found.corpus["sha256"] == self.digest and (scored == wanted or whole) else None

    def structure(self, path: Path, load: Any) -> dict[str, Any]:
        """Measures what attention does, in fp32."""

        def measure() -> dict[str, Any]:
            window = min(1024, self.longest)
            found = measure_structure(load(), self.tokenizer, text=self.experiment.text, window=window, windows=2)
            return found.to_dict()

        return self._kept(path.with_name(f"{path.name}-structure.json"), measure)

    def fidelity(self, path: Path, reference: Path, original: str) -> dict[str, Any]:
        """Measures the divergence from the original."""

        def measure() -> dict[str, Any]:
            models = [self.load(name, self.experiment.dtype) for name in (reference, original)]
            context, text = min(2048, self.longest), self.experiment.text
            return measure_fidelity(models[0], models[1], self.tokenizer, text=text, context=context).to_dict()

        return self._kept(path.with_name(f"{path.name}-fidelity.json"), measure)

    def _kept(self, file: Path, measure: Any) -> dict[str, Any]:
        """Returns what a file holds if it was measured on this experiment's text and windows, else measures it."""
        seen = {"text_sha256": self.digest, "longest": self.longest, "dtype": str(self.experiment.dtype)}
        if file.is_file():
            kept: dict[str, Any] = read(file)
            if kept.pop("measured_on", None) == seen:
                return kept
        say(f"measuring {file.stem}")
        found: dict[str, Any] = measure()
        if rank_and_world_size()[0] == 0:
            write_atomically(file, (json.dumps({**found, "measured_on": seen}, indent=1) + "\n").encode())
        return found


def read(file: Path) -> Any:
    """Returns what a JSON file of ours holds."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'cannot read "{file}": {error}') from None


def say(message: str) -> None:
    """Prints a line of progress, in the first process."""
    if rank_and_world_size()[0] == 0:
        print(visible(message), flush=True)
