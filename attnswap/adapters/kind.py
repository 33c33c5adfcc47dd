"""The adapter type "ATTNSWAP": a member of peft's ``PeftType``."""

import importlib.metadata
from typing import Any

from packaging.version import Version

NAME = "ATTNSWAP"
OLDEST = "0.21"
"""The first version of peft whose tuners choose the tensors of an adapter themselves."""


def installed() -> bool:
    """Whether a version of peft is installed that supports this adapter type."""
    try:
        return Version(importlib.metadata.version("peft")) >= Version(OLDEST)
    except importlib.metadata.PackageNotFoundError:
        return False


def peft_type() -> Any:
    """Returns the adapter type, a member of ``peft.PeftType`` that is added on the first call.

    A process without attnswap does not have it, so that peft refuses a saved swap adapter by name.
    """
    from peft import PeftType

    if NAME not in PeftType.__members__:
        # An Enum has no public way to grow; peft's own methods are members by being written into it.
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_ = NAME, NAME
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        PeftType._member_names_.append(NAME)
    return PeftType(NAME)
