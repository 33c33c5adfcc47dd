"""Compiled libraries on disk: a private folder, one builder at a time, and nothing loaded that is cut or foreign."""

import contextlib
import hashlib
import os
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from attnswap.disk import sync

PATIENCE = 1800.0
"""Seconds one compilation may take, and for which other processes wait for it."""


def base() -> Path:
    """Returns where compiled files are kept: ``ATTNSWAP_CACHE``, or a folder of the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "attnswap")
    return Path(os.environ.get("ATTNSWAP_CACHE") or default)


def library(group: str, name: str, make: Callable[[Path], None], load: Callable[[Path], object]) -> Path:
    """Loads a compiled library, and makes it first where there is none that is sound.

    Args:
        group: Names the processor, the compiler and torch.
        name: Names the library within its group: a word, ``_``, and a digest of its source, which names its folder.
        make: Compiles the library into a file of a scratch folder.
        load: Loads the library; raises OSError where it cannot be loaded.

    Returns:
        The path of the library.

    Raises:
        OSError: The folder or a file belongs to another user or is writable by others, nothing can be written there, or
            the library cannot be loaded. Also what ``make`` raises.
    """
    folder = _private(group, name.rpartition("_")[2])
    target = folder / f"{name}.so"
    if _loads(target, load):
        return target
    with _only_builder(folder / "lock"):
        if not _loads(target, load):  # another process may have made it meanwhile
            _write(target, make)
            load(target)
    return target


def _private(*parts: str) -> Path:
    """Makes the folder of a library, for the user alone, and refuses folders in which others could put files."""
    folder = base()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not os.environ.get("ATTNSWAP_CACHE") and folder.stat().st_uid == os.getuid():
        mode = stat.S_IMODE(folder.stat().st_mode)  # earlier versions made it with the user's umask
        if mode & 0o022:
            folder.chmod(mode & ~0o022)
    refuse_foreign(folder)
    for part in parts:
        folder = folder / part
        folder.mkdir(mode=0o700, exist_ok=True)
        refuse_foreign(folder)
    return folder


def refuse_foreign(path: Path) -> None:
    """Raises PermissionError for a file or folder that another user owns or may change; root may change all anyway.

    In a folder with the sticky bit, such as ``/tmp``, others can add files but not replace the user's.
    """
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0):
        reason = "belongs to another user"
    elif found.st_mode & 0o022 and not (stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX):
        reason = "is writable by other users"
    else:
        return
    raise PermissionError(
        f"{path} {reason}, and code found there would be run; set ATTNSWAP_CACHE to a folder of your own"
    )


def _loads(target: Path, load: Callable[[Path], object]) -> bool:
    """Loads a library if it is whole: the loader does not look, and a file cut short ends the process by SIGBUS."""
    try:
        for path in (target, _record(target)):
            refuse_foreign(path)
        if _record(target).read_text(encoding="ascii") != _digest(target):
            return False
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        return False
    try:
        load(target)
    except OSError:  # such as one made for another C library
        return False
    return True


def _record(target: Path) -> Path:
    return target.with_suffix(".so.sha256")


def _digest(target: Path) -> str:
    return hashlib.sha256(target.read_bytes()).hexdigest()


def _write(target: Path, make: Callable[[Path], None]) -> None:
    """Makes a library, and puts it and its digest in place so that a crash leaves both whole or neither valid."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="scratch-") as scratch:
        made, record = Path(scratch) / "made.so", Path(scratch) / "digest"
        make(made)
        record.write_text(_digest(made), encoding="ascii")
        for source, place in ((made, target), (record, _record(target))):
            source.chmod(0o600)
            sync(source)
            os.replace(source, place)
    sync(target.parent)


@contextlib.contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Keeps other processes from building the same; the lock ends with this process, however that ends.

    Whoever cannot lock (some network file systems), or has waited for :data:`PATIENCE`, builds as well: libraries are
    put in place whole, so that costs time alone.
    """
    import fcntl  # not on Windows, where this backend is refused

    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b") as file:
        deadline, told = time.monotonic() + PATIENCE, False
        while time.monotonic() < deadline:
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a forked child does not inherit it
                break
            except (BlockingIOError, PermissionError):
                if not told:
                    say("waiting for another process, which compiles the same kernels")
                told = True
                time.sleep(0.1)
            except OSError:
                break
        yield


def say(message: str) -> None:
    """Tells the user, once for all processes of a distributed run."""
    if os.environ.get("RANK", "0") == "0":
        print(f"attnswap: {message}", file=sys.stderr)
