"""The errors attnswap raises. A message says what is wrong and what to do; the command line prints only the message."""


class AttnSwapError(Exception):
    """Base class of every error that attnswap raises itself.

    Attributes:
        exit_code: The exit code of the command line for this kind of error.
    """

    exit_code: int = 1


class ConfigError(AttnSwapError, ValueError):
    """A bad argument: an unknown swap, key or feature, or a value out of range."""

    exit_code = 2


class DerivativeError(ConfigError, RuntimeError):
    """A derivative that a backend does not compute. Also a RuntimeError, which torch raises in the same situation."""


class UnsupportedModelError(AttnSwapError):
    """A model, mask, cache or attention argument with which attnswap cannot compute the exact result."""

    exit_code = 3


class CheckpointError(AttnSwapError):
    """A checkpoint that is incomplete, unreadable or of an unknown format."""

    exit_code = 2


class NumericsError(AttnSwapError):
    """A computation produced a non-finite value."""

    exit_code = 4


def non_finite(what: str) -> NumericsError:
    """Returns the error for a model output that is not finite.

    Args:
        what: What is not finite, and where.
    """
    return NumericsError(f"{what}: check the model's weights, or measure with --dtype fp32 (dtype=torch.float32)")


class StoppedError(AttnSwapError):
    """Training ended early on a signal such as SIGTERM. A checkpoint was saved first."""

    exit_code = 143  # 128 + SIGTERM: schedulers then queue the job again


def nearest(name: str, choices: list[str]) -> str:
    """Returns ``' Did you mean "x"?'`` for the choice closest to ``name``, or an empty string.

    A choice that is a prefix of the name, or has the name as a prefix (``eps`` and ``epsilon``), counts as closest.
    """
    import difflib

    prefixes = [c for c in choices if len(name) > 2 < len(c) and (name.startswith(c) or c.startswith(name))]
    match = difflib.get_close_matches(name, prefixes or choices, n=1, cutoff=0.0 if prefixes else 0.4)
    return f' Did you mean "{match[0]}"?' if match else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or the name of its type if the message is empty."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with this message unless the condition holds."""
    if not condition:
        raise ConfigError(message)
