"""Draw a swap's weight curve against softmax's, in the terminal."""

import torch

from attnswap.swaps.base import Call, Numbers, Swap


def draw(swap: Swap, keys: int = 64, width: int = 50) -> None:
    """Prints the weight of one key as its score moves, the other keys' scores being drawn from a normal law.

    Args:
        swap: The swap, with its features at their initial values and per-token gates at 0.
        keys: How many keys the row sees.
        width: Length of the longest bar.
    """
    torch.manual_seed(0)
    others = torch.randn(keys - 1, dtype=torch.float64)
    features = {}
    for name, feature in swap.features().items():
        features[name] = torch.full((1, 1 if feature.per == "head" else keys), feature.initial or 0.0).double()
    p = Numbers(ramp=1.0, **{k: v.squeeze() for k, v in features.items() if v.numel() == 1})
    n = torch.tensor([[float(keys)]], dtype=torch.float64)
    terms = swap.terms(Call(n=n, features=features, ramp=1.0, position=torch.tensor([keys - 1])))
    print(f"{swap.name}: weight of one key among {keys} (#), softmax's (|)")
    for score in torch.arange(-3.0, 6.5, 0.5, dtype=torch.float64):
        row = torch.cat([score[None], others])
        softmax = float(row.softmax(0)[0])
        scaled = row * (terms.query_scale if terms.query_scale is not None else 1.0)
        scaled = (scaled + (terms.query_bias if terms.query_bias is not None else 0.0)).flatten()
        shift = _shift(swap, scaled, p)
        total = swap.norm(scaled, shift, p).sum() + swap.null(shift, n.squeeze(), p)
        weight = float(swap.weight(scaled, shift, p)[0] / total)
        bar = list("#" * round(weight * width) + " " * (width + 1 - round(weight * width)))
        bar[min(round(softmax * width), width)] = "|"
        print(f"{float(score):5.1f} {weight:7.4f} {''.join(bar)}")


def _shift(swap: Swap, row: torch.Tensor, p: Numbers) -> torch.Tensor:
    """Returns a row's shift, or by bisection its threshold."""
    if not swap.threshold:
        floor = swap.shift_floor(p)
        shift = row.max() if swap.shifted else torch.zeros((), dtype=row.dtype)
        return shift if floor is None else shift.clamp(min=floor)
    low, high = (torch.as_tensor(x) for x in swap.bracket(row.max(), torch.tensor(float(len(row))), p))
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if swap.weight(row, middle, p).sum() > 1 else (low, middle)
    return low
