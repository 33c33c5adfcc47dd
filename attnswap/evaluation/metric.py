"""The perplexity measurement as a metric of the ``evaluate`` library.

    metric = evaluate.load("<path of this file>")        # or: from attnswap.evaluation.metric import AttnSwapPerplexity
    metric.compute(model=model, tokenizer=tokenizer, predictions=[text], contexts=[512, 2048])

Unlike the library's own perplexity metric it takes a model object, patched or not, and scores every token once.
"""

from typing import Any

import datasets
import evaluate

from attnswap.evaluation.perplexity import evaluate_perplexity


class AttnSwapPerplexity(evaluate.Metric):
    """Perplexity and bits per byte of a model object at several context lengths over the same tokens."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Perplexity and bits per byte of a live causal language model at several context lengths, "
            "over the same tokens, each scored once.",
            citation="",
            inputs_description=(
                "predictions (list of str): documents of one text, joined by blank lines. model, tokenizer: live "
                "objects. Further keywords as for attnswap.evaluation.evaluate_perplexity, such as contexts, stride, "
                "max_tokens. Returns lists over ascending contexts: contexts, perplexities, bits_per_byte, nll, se; "
                "and scored_tokens."
            ),
            features=datasets.Features({"predictions": datasets.Value("large_string")}),
        )

    def _compute(self, predictions: list[str], model: Any, tokenizer: Any, **options: Any) -> dict[str, Any]:
        found = evaluate_perplexity(
            model, tokenizer, text=predictions, **{"quiet": True, "positions": False, **options}
        )
        return {
            "contexts": [entry.length for entry in found.metrics],
            "perplexities": [entry.ppl for entry in found.metrics],
            "bits_per_byte": [entry.bpb for entry in found.metrics],
            "nll": [entry.nll for entry in found.metrics],
            "se": [entry.se for entry in found.metrics],
            "scored_tokens": found.protocol.scored_tokens,
        }
