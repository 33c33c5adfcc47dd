"""Swaps as adapters of peft: trained, saved, switched and removed like LoRA, on a base that stays as it is."""
