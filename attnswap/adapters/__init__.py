"""Swaps as adapters of peft: trained, saved, switched and removed like LoRA, on a base that stays as it is."""

import peft  # noqa: F401  # whose import registers the adapters, before one of the modules here is half imported
