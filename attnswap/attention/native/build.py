"""Compile the engine, once per machine, and the maths of each swap, in about a second; both are kept on disk."""

import contextlib
import functools
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from attnswap.attention.lazy import constant
from attnswap.attention.native.program import HERE, digest, headers, source
from attnswap.swaps.base import Swap

FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math"]
"""The last two change no result: no function here sets errno, and nobody reads floating point exceptions."""
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # whole vector registers, where the compiler knows the word

ENGINE = ("engine.cpp", "call.h", "direct.h", "packed.h", "forward.h", "few.h", "rows.h", "backward.h")
"""The files the engine is made of, beside the headers that it shares with compiled swaps."""


def is_row(path: str) -> bool:
    """Whether a path of :func:`program` belongs to a row swap."""
    return Path(path).name.startswith("row_")


def folder() -> Path:
    """Returns where compiled files are kept: ``ATTNSWAP_CACHE``, or a folder of the user's cache.

    They depend on the processor and on torch, which name a folder of their own.
    """
    base = os.environ.get("ATTNSWAP_CACHE") or Path(
        os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"), "attnswap"
    )
    return Path(base) / f"torch-{torch.__version__}-{digest(platform.machine(), _processor())}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def compiler() -> str | None:
    """Returns the C++ compiler that ``torch.utils.cpp_extension`` would use, if there is one."""
    return shutil.which(os.environ.get("CXX", "c++"))


@constant
@functools.cache
def unavailable() -> str | None:
    """Says why the engine cannot be used here, or None; builds it the first time.

    A missing compiler is warned about once: other backends then serve with the same results, more slowly.
    """
    if os.environ.get("ATTNSWAP_NATIVE", "1") == "0":
        return "it is switched off by ATTNSWAP_NATIVE=0"
    reason = None
    if compiler() is None:
        reason = "there is no C++ compiler (install g++ or clang, or set CXX)"
    elif shutil.which("ninja", path=_path()) is None:
        reason = "there is no ninja (pip install ninja)"
    else:
        try:
            _load_engine()
        except (ImportError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
            lines = str(error).strip().splitlines()
            reason = f"it does not build: {next((x for x in lines if 'error' in x), lines[-1] if lines else error)}"
    if reason:
        warnings.warn(f"attnswap: no native CPU kernels, since {reason}; slower ones serve instead", stacklevel=2)
    return reason


def _path() -> str:
    """Returns where programs are looked for: also beside the interpreter, whose environment may not be active."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(sys.executable).parent)])


@contextlib.contextmanager
def _own_programs() -> Iterator[None]:
    """Lets torch's builder find what is installed beside the interpreter."""
    before = os.environ.get("PATH")
    os.environ["PATH"] = _path()
    try:
        yield
    finally:
        del os.environ["PATH"]
        if before is not None:
            os.environ["PATH"] = before


def _load_engine() -> None:
    from torch.utils import cpp_extension  # brings setuptools, which importing attnswap should not need

    text = "".join((HERE / name).read_text() for name in ENGINE)
    # With the place of the sources, which ninja builds anew for: two checkouts would undo each other's work.
    name = f"attnswap_engine_{digest(text, headers(), str(HERE), *FLAGS)}"
    target = folder() / name
    target.mkdir(parents=True, exist_ok=True)
    if not (target / f"{name}.so").exists() and os.environ.get("RANK", "0") == "0":
        print("attnswap: compiling the CPU kernels, once for this machine (about half a minute)", file=sys.stderr)
    with _own_programs():
        cpp_extension.load(
            name,
            [str(HERE / "engine.cpp")],
            extra_cflags=FLAGS,
            extra_ldflags=["-fopenmp", "-ldl"],
            build_directory=str(target),
            is_python_module=False,
        )


@constant
@functools.cache
def program(swap: Swap, whole: bool) -> str:
    """Returns the path of a swap's compiled maths, compiling it if that has not been done on this machine.

    Args:
        swap: The swap.
        whole: Compile it for lambda 1 alone.

    Raises:
        RuntimeError: The compiler refuses it.
    """
    text = source(swap, whole)
    target = folder() / f"{'row' if swap.threshold else 'swap'}_{digest(text, headers(), *FLAGS)}.so"
    if target.exists():
        return str(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        (Path(scratch) / "swap.cpp").write_text(text)
        made = Path(scratch) / "swap.so"
        command = [str(compiler()), *FLAGS, f"-I{HERE}", "-shared", "-fPIC", str(Path(scratch) / "swap.cpp")]
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the maths of {swap!r} does not compile:\n{done.stderr[:2000]}")
        os.replace(made, target)  # another process may have made the same
    return str(target)
