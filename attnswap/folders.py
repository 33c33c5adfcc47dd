"""Which folders a command may write, checked before it does any work."""

import os
from pathlib import Path

from attnswap.errors import ConfigError


def check_writable(folder: Path, option: str) -> None:
    """Refuses a folder that cannot be written or made.

    Args:
        folder: What the user named.
        option: The option that named it, for the error.

    Raises:
        ConfigError: It is a file, or it lies in a folder that cannot be written.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f'{option}: "{folder}" is a file; name a directory')
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not above.is_dir():
        raise ConfigError(f'{option}: "{above}" is a file; name a directory')
    if not os.access(above, os.W_OK) or above.is_relative_to("/proc"):
        raise ConfigError(f'{option}: nothing can be written to "{above}"')


def check_replaceable(folder: Path, option: str) -> None:
    """Refuses a folder that no result may take the place of, whatever it holds.

    Args:
        folder: What the user named, with symbolic links resolved.
        option: The option that named it, for the error.

    Raises:
        ConfigError: It is, or contains, the working directory or the user's home, or it is a mount point.
    """
    try:
        home = Path.home().resolve()
    except RuntimeError:  # a user without one
        home = None
    for what, path in (("the working directory", Path.cwd()), ("your home directory", home)):
        if path is not None and path.is_relative_to(folder):
            which = "is" if path == folder else "contains"
            raise ConfigError(
                f'{option}: "{folder}" {which} {what}, which cannot be replaced by a result: name a folder in it'
            )
    if os.path.ismount(folder):
        raise ConfigError(f'{option}: "{folder}" is a mount point and cannot be renamed: name a folder in it')
