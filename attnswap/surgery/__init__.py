"""The seam to transformers: patch, undo, save and reload.

Importing this package imports none of its modules, so that ``import attnswap`` need not wait for transformers.
"""
