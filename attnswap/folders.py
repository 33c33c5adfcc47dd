"""Check that a command may write its output folder, before it does any work."""

import os
from pathlib import Path

from attnswap.errors import ConfigError


def check_writable(folder: Path, option: str) -> None:
    """Refuses a folder that cannot be written or created.

    Args:
        folder: The folder.
        option: The option that names it, for the error message.

    Raises:
        ConfigError: The path is a file, or lies in a folder that cannot be written.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise ConfigError(f'{option}: "{folder}" is a file; name a directory')
    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not parent.is_dir():
        raise ConfigError(f'{option}: "{parent}" is a file; name a directory')
    if not os.access(parent, os.W_OK) or parent.is_relative_to("/proc"):
        raise ConfigError(f'{option}: "{parent}" is not writable; name another directory')


def check_replaceable(folder: Path, option: str) -> None:
    """Refuses a folder that must never be replaced by a result, whatever it contains.

    Args:
        folder: The folder, with symbolic links resolved.
        option: The option that names it, for the error message.

    Raises:
        ConfigError: The folder is, or contains, the working directory or the user's home, or is a mount point.
    """
    try:
        home = Path.home().resolve()
    except RuntimeError:  # the user has no home directory
        home = None
    for what, path in (("the working directory", Path.cwd()), ("your home directory", home)):
        if path is not None and path.is_relative_to(folder):
            which = "is" if path == folder else "contains"
            raise ConfigError(
                f'{option}: "{folder}" {which} {what} and cannot be replaced by a result: name a folder inside it'
            )
    if os.path.ismount(folder):
        raise ConfigError(f'{option}: "{folder}" is a mount point and cannot be renamed: name a folder inside it')
