"""The result of an evaluation, and the two files it is saved in."""

import io
import json
import os
import tempfile
import zipfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from attnswap.errors import ConfigError
from attnswap.evaluation.windows import Protocol

SCHEMA = "attnswap.eval/1"


@dataclass(frozen=True)
class ContextMetrics:
    """Metrics at one context length.

    Attributes:
        length: Context length in tokens.
        nll: Mean negative log-likelihood in nats per token, accumulated in fp64.
        ppl: ``exp(nll)``.
        bpb: Bits per byte: summed NLL in bits over the bytes of the scored tokens' text.
        se: Standard error of ``nll`` by block bootstrap.
    """

    length: int
    nll: float
    ppl: float
    bpb: float
    se: float


@dataclass(frozen=True)
class PositionNLL:
    """Mean NLL, in nats per token, of the ``n`` tokens that have ``lo`` to ``hi`` tokens of text before them."""

    lo: int
    hi: int
    nll: float
    n: int


@dataclass(frozen=True)
class Evaluation:
    """A model's losses over one text.

    Attributes:
        protocol: Which tokens were scored, and how.
        metrics: One entry per context length, ascending.
        nll: NLL in nats of every scored token, fp32 (scored_tokens,), by context length.
        position_nll: NLL by position in disjoint windows of the largest context, in buckets of doubling size; empty if
            it was not measured.
        model: ``id``, ``revision``, ``arch``, ``params``, ``max_position_embeddings``.
        swap: The swap's entry in the model's configuration, or None.
        corpus: ``id``, ``license``, ``sha256``, ``bytes``, ``tokens``, ``tokenizer_sha256``.
        env: Versions, device, dtype, attention implementation, seed.
        cost: Seconds and tokens by context length, tokens per second, peak memory, and the estimate made before.
        created: UTC time, ISO 8601.
        notes: Remarks for the reader, such as contexts beyond the trained length.
    """

    protocol: Protocol
    metrics: list[ContextMetrics]
    nll: dict[int, np.ndarray]
    position_nll: list[PositionNLL]
    model: dict[str, Any]
    swap: dict[str, Any] | None
    corpus: dict[str, Any]
    env: dict[str, Any]
    cost: dict[str, Any]
    created: str
    notes: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Short name for tables and plots: the last part of the model's id."""
        return Path(str(self.model["id"])).name or str(self.model["id"])

    def at(self, length: int) -> ContextMetrics:
        """Returns the metrics of one context length; raises :class:`ConfigError` if it was not evaluated."""
        for entry in self.metrics:
            if entry.length == length:
                return entry
        raise ConfigError(f"context {length} was not evaluated: {list(self.protocol.contexts)} were")

    def to_dict(self) -> dict[str, Any]:
        """Returns the report (schema ``attnswap.eval/1``) without the losses of single tokens."""
        return {
            "schema": SCHEMA,
            "created": self.created,
            "attnswap": self.env["attnswap"],
            "env": {key: value for key, value in self.env.items() if key != "attnswap"},
            "model": self.model,
            "swap": self.swap,
            "corpus": self.corpus,
            "protocol": self.protocol.to_dict(),
            "metrics": {
                "ppl": [asdict(entry) for entry in self.metrics],
                "position_nll": [asdict(entry) for entry in self.position_nll],
            },
            "cost": self.cost,
            "notes": self.notes,
        }

    def save(self, path: str | Path, **extra: Any) -> Path:
        """Writes the report to ``path`` (.json) and the losses of single tokens beside it (.npz), each atomically.

        Args:
            path: The JSON file; its directory is created if it does not exist.
            **extra: More top-level entries of the report.

        Returns:
            The JSON file's path.
        """
        path = Path(path)
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {str(length): values for length, values in self.nll.items()}
        np.savez(buffer, **arrays)
        write_atomically(path.with_suffix(".npz"), buffer.getvalue())
        report = json.dumps({**self.to_dict(), **extra}, indent=2, allow_nan=False)
        write_atomically(path, (report + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Evaluation":
        """Reads an evaluation that :meth:`save` wrote.

        Args:
            path: The JSON file; the .npz file must be beside it.

        Raises:
            ConfigError: A file is missing or is not of an evaluation, or the two belong to different runs.
        """
        path = Path(path)
        try:
            report = json.loads(path.read_text(encoding="utf-8-sig"))
            if not isinstance(report, dict) or report.get("schema") != SCHEMA:
                raise ConfigError(f'"{path}" is not an evaluation: its schema is not "{SCHEMA}"')
            with np.load(path.with_suffix(".npz"), allow_pickle=False) as arrays:
                nll = {int(length): arrays[length] for length in arrays.files}
            fields = {name: report["protocol"][name] for name in Protocol.__dataclass_fields__}
            evaluation = cls(
                protocol=Protocol(**{**fields, "contexts": tuple(fields["contexts"])}),
                metrics=[ContextMetrics(**entry) for entry in report["metrics"]["ppl"]],
                nll=nll,
                position_nll=[PositionNLL(**entry) for entry in report["metrics"]["position_nll"]],
                env={"attnswap": report["attnswap"], **report["env"]},
                **{key: report[key] for key in ("model", "swap", "corpus", "cost", "created", "notes")},
            )
        except ConfigError:
            raise
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(
                f'cannot read the evaluation "{path}" and its .npz: {type(error).__name__}: {error}; '
                "give the JSON file that attnswap eval --out wrote, with the .npz beside it"
            ) from error
        for entry in evaluation.metrics:
            values = nll.get(entry.length, np.empty(0))
            if len(values) != evaluation.protocol.scored_tokens or abs(mean_nll(values) - entry.nll) > 1e-6:
                raise ConfigError(f'"{path}" and the .npz beside it belong to different runs: evaluate again')
        return evaluation


def mean_nll(values: np.ndarray) -> float:
    """Returns the mean of fp32 losses, accumulated in fp64."""
    return float(values.astype(np.float64).sum() / len(values))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a temporary name and renames it, so that a reader never sees an incomplete file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """Returns the umask of the process, which mkstemp does not apply."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
