"""Everything that is measured on a GPU, as steps that can be run one by one: ``python -m tests.gpu --help``."""
