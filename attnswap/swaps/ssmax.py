"""Scalable-Softmax: sharpen the scores by the logarithm of how many keys a query sees.

Softmax flattens as the context grows: the largest weight shrinks like 1/n. SSMax multiplies the scores of query i by
a factor that grows with ln n_i, so that n^(s z) takes the place of e^z:

    w_ij = softmax_j(a_i z_ij),   scale:    a_i = s ln n_i
                                  affine:   a_i = s ln n_i + b
                                  anchored: a_i = 1 + s max(0, ln n_i - ln n_train)

``s`` and ``b`` are learned per head and layer. The published form is ``scale``; put into a pretrained model with
s = 0.168 (one over the mean of ln n up to 1024) it softens short rows and sharpens long ones. ``affine`` (s = 0,
b = 1) and ``anchored`` (s = 0) leave the model as it was until training moves them.

Caveats: the query is scaled, never the key, since n differs from query to query; n counts the visible keys, so it
restarts at packed document borders and stops growing at a sliding window.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from attnswap.errors import require
from attnswap.swaps.base import Call, Feature, ModelInfo, Swap, Terms, resolve_init

LATE_START = 0.168
"""The published start of ``s`` for a swap after pretraining: 1 / mean of ln n for n up to 1024."""


@dataclass(frozen=True)
class SSMax(Swap):
    """Scalable-Softmax (Nakanishi, arXiv 2501.19399).

    Attributes:
        form: The factor on the scores, with s and b learned per head: ``"affine"``: s ln n + b; ``"scale"``: s ln n,
            the paper's; ``"anchored"``: 1 + s max(0, ln n - ln train_length). n is the number of visible keys.
        init: ``"identity"`` (affine and anchored; their default) or ``"paper"`` (s = 0.168, b = 0).
        train_length: Trained context in tokens, for ``anchored``; None: the model's ``max_position_embeddings``.
    """

    form: Literal["affine", "scale", "anchored"] = "affine"
    init: Literal["identity", "paper"] | None = None
    train_length: int | None = None

    name: ClassVar[str] = "ssmax"
    paper: ClassVar[str] = "Scalable-Softmax Is Superior for Attention (arXiv 2501.19399)"
    summary: ClassVar[str] = "softmax((s ln n + b) z), with s and b learned per head; n is the number of visible keys"
    needs_n: ClassVar[bool] = True
    native_ramp: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.train_length is None or self.train_length > 0, "ssmax: train_length must be a positive number")
        object.__setattr__(self, "init", resolve_init(self.init, self.form != "scale", "ssmax"))

    @classmethod
    def examples(cls) -> Sequence[Self]:
        return (
            cls(),
            cls(init="paper"),
            cls(form="scale"),
            cls(form="anchored", train_length=3),
            cls(form="anchored", train_length=3, init="paper"),
        )

    @property
    def exact_identity(self) -> bool:
        return self.init == "identity"

    def bind(self, info: ModelInfo) -> Self:
        if self.form != "anchored" or self.train_length is not None:
            return self
        require(
            info.max_positions is not None,
            "ssmax: the model's config names no max_position_embeddings; give train_length",
        )
        return replace(self, train_length=info.max_positions)

    def features(self) -> dict[str, Feature]:
        start = 0.0 if self.init == "identity" else LATE_START
        scale = {"scale": Feature("head", initial=start, what="s, the weight of ln n")}
        if self.form == "affine":
            scale["offset"] = Feature("head", initial=float(self.init == "identity"), what="b, the constant part")
        return scale

    def terms(self, call: Call) -> Terms:
        scale, log_n = call.features["scale"], call.n.clamp(min=1).log()
        if self.form == "anchored":
            require(self.train_length is not None, 'ssmax: form="anchored" needs train_length outside a model')
            change = scale * (log_n - math.log(self.train_length or 1)).clamp(min=0)
        elif self.form == "affine":
            change = scale * log_n + (call.features["offset"] - 1)
        else:
            change = scale * log_n - 1
        return Terms(query_scale=1 + call.ramp * change)


if __name__ == "__main__":
    from attnswap.swaps.curves import draw

    draw(SSMax(form="scale"))
