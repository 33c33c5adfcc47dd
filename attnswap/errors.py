"""The errors attnswap raises. Each names the cause and the way out; the CLI prints the message alone."""


class AttnSwapError(Exception):
    """Base class of every error raised on purpose.

    Attributes:
        exit_code: What the command line returns for this kind of error.
    """

    exit_code: int = 1


class ConfigError(AttnSwapError, ValueError):
    """A bad argument: an unknown swap, key or feature, or a value out of range."""

    exit_code = 2


class DerivativeError(ConfigError, RuntimeError):
    """A derivative that a backend does not compute; a RuntimeError too, as torch raises for its own kernels."""


class UnsupportedModelError(AttnSwapError):
    """The model, mask, cache or attention argument cannot be served exactly, so it is refused."""

    exit_code = 3


class CheckpointError(AttnSwapError):
    """A checkpoint that is incomplete, unreadable or of an unknown format."""

    exit_code = 2


class NumericsError(AttnSwapError):
    """A computation produced a non-finite value."""

    exit_code = 4


def non_finite(what: str) -> NumericsError:
    """Returns the error for ``what`` a model gave that is not finite, with what a user can do about it."""
    return NumericsError(f"{what}: check the model's weights, or measure with --dtype fp32 (dtype=torch.float32)")


class StoppedError(AttnSwapError):
    """Training ended early because the process was asked to stop. Nothing is lost: a checkpoint was saved."""

    exit_code = 143  # what a process returns that SIGTERM ends, so that schedulers queue it again


def nearest(name: str, choices: list[str]) -> str:
    """Returns ``' Did you mean "x"?'`` for the choice closest to ``name``, or an empty string.

    One that the name begins with (``eps`` for ``epsilon``), or that begins with the name, is closest.
    """
    import difflib

    begun = [c for c in choices if len(name) > 2 < len(c) and (name.startswith(c) or c.startswith(name))]
    match = difflib.get_close_matches(name, begun or choices, n=1, cutoff=0.0 if begun else 0.4)
    return f' Did you mean "{match[0]}"?' if match else ""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def require(condition: bool, message: str) -> None:
    """Raises ConfigError with a message unless a condition holds."""
    if not condition:
        raise ConfigError(message)
