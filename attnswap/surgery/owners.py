"""Which model has which other model as a part, as far as their construction was seen.

Modules do not know their parents. A model that was built before attnswap was imported, copied or unpickled is not
known here, so nothing may depend on these records alone: saving checks what is written (:mod:`.saving`).
"""

from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import PreTrainedModel

_OWNERS: "WeakKeyDictionary[nn.Module, ref[PreTrainedModel]]" = WeakKeyDictionary()


def record(model: PreTrainedModel) -> None:
    """Notes that a model has been built around its parts."""
    for part in model.children():
        if isinstance(part, PreTrainedModel):
            _OWNERS[part] = ref(model)


def outermost(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the largest model known to have this one as a part, else the model itself."""
    seen = {id(model)}
    while (owner := _OWNERS.get(model)) is not None:
        outer = owner()
        if outer is None or id(outer) in seen or not any(part is model for part in outer.children()):
            break
        seen.add(id(outer))
        model = outer
    return model
