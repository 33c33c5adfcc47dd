"""Works out what training a 7B and a 70B model needs; prints the table of docs/scaling.md.

    python recipes/scaling.py

Nothing here is measured: memory is counted; time is floating point operations over an assumed share of a GPU's peak.
"""

from dataclasses import dataclass

from attnswap.markdown import markdown_table

GIB = 2**30
PEAK = 989e12
"""bf16 operations per second of an H100 SXM without sparsity, as its maker says."""
UTILISATION = 0.4
"""Share of it that large training runs are usually reported to reach."""
CAPACITY = 80e9 / GIB


@dataclass(frozen=True)
class Shape:
    """A Llama 2 model: weights, layers, hidden size, key/value heads over heads."""

    name: str
    weights: float
    layers: int
    hidden: int
    shared: float


@dataclass(frozen=True)
class Run:
    """A way to train: GPUs, context, and whether all weights are trained or an adapter on frozen 16-bit ones."""

    gpus: int
    context: int
    full: bool


SHAPES = [Shape("7B", 6.74e9, 32, 4096, 1.0), Shape("70B", 68.98e9, 80, 8192, 1 / 8)]
RUNS = {
    "7B": [Run(1, 8192, False), Run(8, 8192, True), Run(8, 32768, True)],
    "70B": [Run(8, 8192, False), Run(32, 8192, True), Run(32, 16384, True), Run(64, 32768, True)],
}


def state_gib(shape: Shape, run: Run) -> float:
    """Weights, gradients and the two moments of AdamW in fp32, sharded; or frozen bf16 weights (adapters are small)."""
    return shape.weights * (16 if run.full else 2) / run.gpus / GIB


def activations_gib(shape: Shape, run: Run) -> float:
    """One sequence with gradient checkpointing: every layer's input, and one layer's inner values, in bf16.

    Inside a layer: norms, query, key, value, attention output, and three of the feed-forward size (about 2.7 hidden).
    """
    inner = 2 + 1 + 2 * shape.shared + 2 + 3 * 2.7
    return run.context * shape.hidden * 2 * (shape.layers + 2 * inner) / GIB


def gathered_gib(shape: Shape, run: Run) -> float:
    """Two layers' weights in bf16, gathered from all GPUs, and their gradients."""
    return 0.0 if run.gpus == 1 else 2 * 2 * 2 * shape.weights / shape.layers / GIB


def tokens_per_second(shape: Shape, run: Run) -> float:
    """Tokens per second and GPU: forward, backward and recomputed forward, causal attention counted as half."""
    weights = (8 if run.full else 6) * shape.weights  # frozen weights have no gradient of their own
    attention = 8 * run.context * shape.hidden * shape.layers
    return UTILISATION * PEAK / (weights + attention)


def table() -> str:
    """Returns the table as Markdown."""
    head = (
        "model",
        "trained",
        "context",
        "GPUs of 80 GB",
        "weights and optimizer state per GPU",
        "activations",
        "FSDP2 all-gather buffers",
        "sum",
    )
    rows = []
    for shape in SHAPES:
        for run in RUNS[shape.name]:
            parts = state_gib(shape, run), activations_gib(shape, run), gathered_gib(shape, run)
            fits = "" if sum(parts) < 0.9 * CAPACITY else " (does not fit)"
            sizes = [f"{part:.1f} GiB" for part in (*parts, sum(parts))]
            sizes[-1] += fits
            trained = "all weights" if run.full else "adapter"
            speed = f"{tokens_per_second(shape, run):,.0f}"
            rows.append([shape.name, trained, str(run.context), str(run.gpus), *sizes, speed])
    return markdown_table((*head, "tokens/s per GPU"), rows, words=2)


if __name__ == "__main__":
    print(table())
