"""The measurements of an experiment, which are cached in files."""

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
from attnswap.training.movement import load_start
from attnswap.visible import visible


class CachedMeasurements:
    """Measures the models of an experiment. A measurement that is in a file already is read from there.

    Args:
        experiment: The experiment.
        tokenizer: The tokenizer of its models.
    """

    def __init__(self, experiment: Experiment, tokenizer: PreTrainedTokenizerBase) -> None:
        self.experiment, self.tokenizer = experiment, tokenizer
        self._baseline: Evaluation | None = None
        self.longest = max(experiment.contexts)
        self.device = experiment.device or init_process_group(None) or default_device()

    def load(self, reference: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Loads a model to the device of the measurements."""
        return load_model(reference, dtype=dtype, device=self.device)

    def unhealed(self, dtype: torch.dtype = torch.float32, fitted: Path | None = None) -> PreTrainedModel:
        """Returns the patched model before training.

        Args:
            dtype: Dtype of the model.
            fitted: File of fitted initial values of the swap's parameters; None: not fitted.
        """
        config = self.experiment.config
        model = load_model(config.model.reference, dtype=dtype)
        assert config.swap is not None
        # Gates may be initialised with noise, which must be that of training: same seed, and on the CPU.
        set_seed(self.experiment.seed)
        attnswap.patch(model, config.swap, part=config.part, layers=config.layers, heads=config.heads)
        if fitted is not None:
            load_start(model, fitted)
        return model.to(device=self.device)  # type: ignore[call-arg, no-any-return]

    def perplexity(self, path: Path, load: Any, *, ablate: bool = False) -> Evaluation:
        """Measures perplexity at all contexts.

        Args:
            path: Folder of the file, and name of the model, which begins the file's name.
            load: Loads the model; called with the argument ``dtype``.
            ablate: Measure the model with softmax in place of its swaps.
        """
        file = path.with_name(f"{path.name}-losses.json")
        found = self._cached_perplexity(file)
        if found is None:
            print_progress(f"measuring {path.name}")
            model = load(dtype=self.experiment.dtype)
            with attnswap.bypassed(model) if ablate else nullcontext():
                found = evaluate_perplexity(
                    model,
                    self.tokenizer,
                    text=self.experiment.text,
                    contexts=self.experiment.contexts,
                    max_tokens=self.experiment.max_tokens,
                    positions=False,
                    baseline=self._baseline,
                    model_id=path.name,
                    corpus_id=self.experiment.text_id,
                    quiet=not sys.stderr.isatty(),
                )
            if rank_and_world_size()[0] == 0:
                found.save(file)
        self._baseline = self._baseline or found
        return found

    def _cached_perplexity(self, file: Path) -> Evaluation | None:
        """Returns the evaluation in a file if it is of this experiment's text, contexts and dtype, else None."""
        if not file.is_file():
            return None
        found = Evaluation.load(file)
        dtype = str(self.experiment.dtype).removeprefix("torch.")
        if found.protocol.contexts != tuple(sorted(self.experiment.contexts)) or found.env["dtype"] != dtype:
            return None
        if self._baseline is not None:
            try:
                check_comparable(found.protocol, self._baseline.protocol)
            except ConfigError:
                return None
            return found
        scored, wanted = found.protocol.scored_tokens, self.experiment.max_tokens
        reached_end = scored < wanted and found.protocol.end == found.corpus["tokens"]
        same_text = found.corpus["sha256"] == self.experiment.text_sha256
        return found if same_text and (scored == wanted or reached_end) else None

    def structure(self, path: Path, load: Any) -> dict[str, Any]:
        """Measures statistics of the attention weights and hidden states, in fp32."""

        def measure() -> dict[str, Any]:
            window = min(1024, self.longest)
            found = measure_structure(load(), self.tokenizer, text=self.experiment.text, window=window, windows=2)
            return found.to_dict()

        return self._cached(path.with_name(f"{path.name}-structure.json"), measure)

    def fidelity(self, path: Path, reference: Path, original: str) -> dict[str, Any]:
        """Measures the divergence of a model from the original."""

        def measure() -> dict[str, Any]:
            models = [self.load(name, self.experiment.dtype) for name in (reference, original)]
            context, text = min(2048, self.longest), self.experiment.text
            return measure_fidelity(models[0], models[1], self.tokenizer, text=text, context=context).to_dict()

        return self._cached(path.with_name(f"{path.name}-fidelity.json"), measure)

    def _cached(self, file: Path, measure: Any) -> dict[str, Any]:
        """Returns the content of a file if it was measured on this experiment's text and windows, else measures."""
        key = {"text_sha256": self.experiment.text_sha256, "longest": self.longest, "dtype": str(self.experiment.dtype)}
        if file.is_file():
            cached: dict[str, Any] = read_json(file)
            if cached.pop("measured_on", None) == key:
                return cached
        print_progress(f"measuring {file.stem}")
        found: dict[str, Any] = measure()
        if rank_and_world_size()[0] == 0:
            write_atomically(file, (json.dumps({**found, "measured_on": key}, indent=1) + "\n").encode())
        return found


def read_json(file: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f'cannot read "{file}": {error}') from None


def print_progress(message: str) -> None:
    """Prints a line of progress, in the process of rank 0."""
    if rank_and_world_size()[0] == 0:
        print(visible(message), flush=True)
