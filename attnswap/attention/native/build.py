"""Compile the engine, once per machine, and the maths of each swap, in about a second; both are kept on disk."""

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

from attnswap.attention.codegen import solved
from attnswap.attention.lazy import constant, once
from attnswap.attention.native import cache
from attnswap.attention.native.program import HERE, digest, headers, source
from attnswap.swaps.base import Swap

FLAGS = ["-O3", "-march=native", "-std=c++20", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC"]
"""The two about mathematics change no result: no function here sets errno, nobody reads floating point exceptions."""
if platform.machine() in ("x86_64", "AMD64"):
    FLAGS.append("-mprefer-vector-width=512")  # whole vector registers, where the compiler knows the word

ENGINE = ("engine.cpp", "call.h", "direct.h", "packed.h", "forward.h", "few.h", "rows.h", "backward.h")
"""The files the engine is made of, beside the headers that it shares with compiled swaps."""


def is_row(path: str) -> bool:
    """Whether a path of :func:`program` belongs to a row swap."""
    return Path(path).name.startswith("row_")


def compiler() -> list[str] | None:
    """Returns the command of the C++ compiler, ``CXX`` or ``c++``, if there is one."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    found = shutil.which(command[0]) if command else None
    return [found, *command[1:]] if found else None


@constant
@once
def unavailable() -> str | None:
    """Says why the engine cannot be used here, or None; builds it the first time.

    A missing compiler is warned about once: other backends then serve with the same results, more slowly.
    """
    if os.environ.get("ATTNSWAP_NATIVE", "1") == "0":
        return "it is switched off by ATTNSWAP_NATIVE=0"
    if os.name != "posix":
        reason: str | None = "it needs Linux or another POSIX system"
    elif compiler() is None:
        reason = "there is no C++ compiler (install g++ or clang, or set CXX)"
    else:
        reason = _failure(_load_engine)
    if reason:
        warnings.warn(f"attnswap: no native CPU kernels, since {reason}; slower ones serve instead", stacklevel=2)
    return reason


@constant
@once
def refusal(swap: Swap, whole: bool) -> str | None:
    """Says why the engine cannot compute a swap, or None; compiles the swap's maths the first time.

    Where that fails (a full disk, a compiler that was killed) it is warned about once, and not tried again.
    """
    reason = unavailable()
    if reason is None:
        reason = _failure(lambda: program(swap, whole))
        if reason:
            message = f"attnswap: no native CPU kernels for {swap!r}, since {reason}; slower ones serve instead"
            warnings.warn(message, stacklevel=2)
    return reason


def _failure(build: Callable[[], object]) -> str | None:
    """Says in a line why something does not build, or None once it is built."""
    try:
        build()
    except (ImportError, RuntimeError, OSError) as error:
        lines = str(error).strip().splitlines()
        return f"it does not build: {next((x for x in lines if 'error' in x), lines[-1] if lines else repr(error))}"
    return None


def _load_engine() -> None:
    text = "".join((HERE / name).read_text() for name in ENGINE)
    name = f"engine_{digest(text, headers(), *FLAGS)}"

    def make(target: Path) -> None:
        from torch.utils import cpp_extension  # brings setuptools, which importing attnswap should not need

        cache.say("compiling the CPU kernels, once for this machine (about half a minute)")
        includes = [f"-isystem{path}" for path in cpp_extension.include_paths()]
        places = [f"-L{path}" for path in cpp_extension.library_paths()]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        libraries = [*places, "-lc10", "-ltorch_cpu", "-ltorch", "-ldl"]
        _compile(HERE / "engine.cpp", target, [abi, *includes], libraries)

    cache.library(_group(), name, make, torch.ops.load_library)


@constant
@once
def program(swap: Swap, whole: bool) -> str:
    """Returns the path of a swap's compiled maths, compiling it if that has not been done on this machine.

    Args:
        swap: The swap.
        whole: Compile it for lambda 1 alone.

    Raises:
        RuntimeError: The compiler refuses it.
        OSError: It cannot be kept or loaded.
    """
    text = source(swap, whole)
    name = f"{'row' if solved(swap) else 'swap'}_{digest(text, headers(), *FLAGS)}"

    def make(target: Path) -> None:
        written = target.with_name("swap.cpp")
        written.write_text(text)
        _compile(written, target, [f"-I{HERE}"])

    return str(cache.library(_group(), name, make, lambda path: ctypes.CDLL(str(path))))


@functools.cache
def _group() -> str:
    """Names what compiled files depend on beside their source: torch, the compiler, and what it makes of the processor.

    The compiler is asked for its predefined macros: its version and every instruction set that it would use here.
    """
    done = _run(["-dM", "-E", "-x", "c++", os.devnull])
    return f"torch-{torch.__version__}-{digest(platform.machine(), str(torch.version.git_version), done.stdout)}"


def _compile(written: Path, target: Path, before: list[str], after: list[str] | None = None) -> None:
    _run([*before, str(written), "-o", str(target), *(after or [])])


def _run(arguments: list[str]) -> "subprocess.CompletedProcess[str]":
    """Runs the compiler; raises RuntimeError with its first words where it fails."""
    command = [*(compiler() or ["c++"]), *FLAGS, *arguments]
    run = functools.partial(subprocess.run, capture_output=True, check=False, text=True, errors="replace")
    try:
        done = run(command, timeout=cache.PATIENCE, env={**os.environ, "LC_ALL": "C"})
    except subprocess.TimeoutExpired as expired:
        raise RuntimeError(f"{command[0]} has not ended after {cache.PATIENCE:.0f} s") from expired
    if done.returncode < 0:
        raise RuntimeError(f"{command[0]} was killed by signal {-done.returncode}")
    if done.returncode:
        raise RuntimeError(done.stderr[:4000].strip() or f"{command[0]} ended with {done.returncode}")
    return done
