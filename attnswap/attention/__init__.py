"""How a swap is computed: the dense reference, the stock kernel and kernels of our own behind one function."""

from attnswap.attention.functional import attention

__all__ = ["attention"]
