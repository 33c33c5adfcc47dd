"""The folder of compiled kernels: who may put code there, damaged files, killed and failing builds, many at once."""

import os
import signal
import stat
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import attnswap
from attnswap.attention.lazy import once
from attnswap.attention.native import build, cache
from attnswap.errors import ConfigError

posix = pytest.mark.skipif(os.name != "posix", reason="native kernels need POSIX")
WHOLE = b"a whole library"


class Maker:
    """Makes and loads a library of 15 bytes, and counts both."""

    def __init__(self) -> None:
        self.made, self.loaded = 0, 0

    def make(self, target: Path) -> None:
        self.made += 1
        target.write_bytes(WHOLE)

    def load(self, target: Path) -> None:
        assert target.read_bytes() == WHOLE, "damaged code would have been run"
        self.loaded += 1

    def __call__(self) -> Path:
        return cache.library("group", "swap_x", self.make, self.load)


@pytest.fixture
def maker(tmp_path: Path, monkeypatch) -> Maker:
    monkeypatch.setenv("ATTNSWAP_CACHE", str(tmp_path / "cache"))
    return Maker()


def give_away(path: Path, monkeypatch) -> None:
    """Makes a path another user's, or this user another than the path's."""
    if os.getuid() == 0:
        os.chown(path, 65534, 65534)
    else:
        owner = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)


@posix
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o022, 0o077])
def test_everything_is_the_users_alone(maker: Maker, umask: int):
    before = os.umask(umask)
    try:
        target = maker()
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in [cache.base(), *cache.base().rglob("*")]}
    assert modes == {
        **dict.fromkeys(("cache", "group", "x"), 0o700),
        **dict.fromkeys(("swap_x.so", "swap_x.so.sha256", "lock"), 0o600),
    }
    assert target == cache.base() / "group" / "x" / "swap_x.so"
    assert maker() == target and maker.made == 1 and maker.loaded == 2


PLACES = [".", "group", "group/x", "group/x/swap_x.so", "group/x/swap_x.so.sha256"]


@posix
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", ["belongs to another user", "is writable by other users", "by the group"])
def test_what_others_may_change_is_refused(maker: Maker, place: str, fault: str, monkeypatch):
    maker()
    path = cache.base() / place
    if fault == "belongs to another user":
        give_away(path, monkeypatch)
    else:
        path.chmod(path.stat().st_mode | (0o020 if fault == "by the group" else 0o002))
    with pytest.raises(PermissionError, match="set ATTNSWAP_CACHE to a folder of your own") as refused:
        maker()
    assert fault == "by the group" or fault in str(refused.value)
    assert maker.loaded == 1


@posix
def test_a_sticky_folder_of_roots_may_hold_the_cache(maker: Maker):
    """As ``/tmp`` does: others cannot replace what is the user's there."""
    cache.base().mkdir()
    cache.base().chmod(0o1777)
    assert maker().exists()


@posix
def test_the_default_folder_of_earlier_versions_is_closed(maker: Maker, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("ATTNSWAP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "attnswap").mkdir()
    (tmp_path / "attnswap").chmod(0o775)
    assert maker().is_relative_to(tmp_path / "attnswap")
    assert stat.S_IMODE((tmp_path / "attnswap").stat().st_mode) == 0o755


DAMAGES: dict[str, Callable[[Path, Path], object]] = {
    "gone": lambda so, record: so.unlink(),
    "empty": lambda so, record: so.write_bytes(b""),
    "cut": lambda so, record: so.write_bytes(WHOLE[:7]),
    "one bit": lambda so, record: so.write_bytes(b"b" + WHOLE[1:]),
    "longer": lambda so, record: so.write_bytes(WHOLE + b"\0"),
    "no record": lambda so, record: record.unlink(),
    "empty record": lambda so, record: record.write_bytes(b""),
    "record of bytes": lambda so, record: record.write_bytes(b"\xff\xfe"),
}


@posix
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_made_again_and_never_loaded(maker: Maker, damage: str):
    target = maker()
    DAMAGES[damage](target, target.with_suffix(".so.sha256"))
    assert maker() == target
    assert maker.made == 2 and target.read_bytes() == WHOLE
    maker()
    assert maker.made == 2


@posix
def test_a_whole_library_that_does_not_load_is_made_again(maker: Maker):
    """As one that was compiled in a container with a newer C library."""
    target, refused = maker(), []

    def load(path: Path) -> None:
        if maker.made == 1:
            refused.append(path)
            raise OSError("version `GLIBC_9.9' not found")

    assert cache.library("group", "swap_x", maker.make, load) == target
    assert maker.made == 2 and refused


@posix
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("killed"), KeyboardInterrupt()])
def test_a_failed_build_leaves_nothing_and_is_made_up_for(maker: Maker, error: BaseException):
    def fail(target: Path) -> None:
        target.write_bytes(WHOLE[:3])
        raise error

    with pytest.raises(type(error)):
        cache.library("group", "swap_x", fail, maker.load)
    assert [p.name for p in (cache.base() / "group" / "x").iterdir()] == ["lock"]
    assert maker().read_bytes() == WHOLE


@posix
def test_a_read_only_cache_serves_what_it_holds(maker: Maker, monkeypatch):
    maker()

    def read_only(*args: object, **more: object) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("replace", "fsync", "chmod"):
        monkeypatch.setattr(os, name, read_only)
    monkeypatch.setattr(cache.tempfile, "TemporaryDirectory", read_only)
    assert maker().exists()
    with pytest.raises(OSError, match="Read-only"):
        cache.library("group", "swap_y", maker.make, maker.load)


def forked(function: Callable[[], object]) -> int:
    """Runs a function in a forked process and returns its id."""
    child = os.fork()
    if child == 0:
        try:
            function()
        finally:
            os._exit(0)
    return child


@posix
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("worker", [False, True])
def test_the_lock_of_a_killed_build_is_free(maker: Maker, tmp_path: Path, end: int, worker: bool):
    """Also while a process lives that was forked meanwhile, such as a data loader's worker."""
    begun = tmp_path / "begun"

    def build_for_ever(target: Path) -> None:
        target.write_bytes(WHOLE[:3])
        (tmp_path / "id").write_text(str(forked(lambda: time.sleep(60)) if worker else 0))
        begun.touch()
        time.sleep(60)

    child = forked(lambda: cache.library("group", "swap_x", build_for_ever, maker.load))
    while not begun.exists():
        time.sleep(0.01)
    os.kill(child, end)
    os.waitpid(child, 0)
    start = time.monotonic()
    try:
        assert maker().read_bytes() == WHOLE
        assert time.monotonic() - start < 5
    finally:
        if worker:
            os.kill(int((tmp_path / "id").read_text()), signal.SIGKILL)


@posix
def test_of_several_processes_one_builds(maker: Maker, tmp_path: Path):
    log = tmp_path / "log"
    log.touch()

    def slowly(target: Path) -> None:
        with log.open("a") as file:
            file.write("built\n")
        time.sleep(0.2)
        target.write_bytes(WHOLE)

    children = [forked(lambda: cache.library("group", "swap_x", slowly, maker.load)) for _ in range(4)]
    for child in children:
        os.waitpid(child, 0)
    assert log.read_text() == "built\n"
    maker()
    assert maker.made == 0 and maker.loaded == 1


@posix
@pytest.mark.parametrize("error", [OSError(37, "No locks available"), OSError(95, "Operation not supported")])
def test_without_locks_everybody_builds(maker: Maker, error: OSError, monkeypatch):
    import fcntl

    def refuse(*args: object) -> None:
        raise error

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert maker().read_bytes() == WHOLE


@posix
def test_whoever_has_waited_for_long_builds_itself(maker: Maker, monkeypatch, capsys):
    import fcntl

    def held(*args: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", held)
    monkeypatch.setattr(cache, "PATIENCE", 0.3)
    assert maker().read_bytes() == WHOLE
    assert capsys.readouterr().err.count("waiting for another process") == 1


def test_once_among_threads():
    calls = []

    @once
    def slow(x: int) -> int:
        calls.append(x)
        time.sleep(0.05)
        return x + 1

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(slow, [1] * 8)) == [2] * 8
    assert calls == [1]


FAILURES: dict[str, Callable[[], object]] = {
    "full disk": lambda: OSError(28, "No space left on device"),
    "killed compiler": lambda: RuntimeError("c++ was killed by signal 9"),
    "compiler's error": lambda: RuntimeError("swap.cpp:1: error: no"),
    "foreign folder": lambda: PermissionError("belongs to another user"),
}


@pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
@pytest.mark.parametrize("place", ["compiler", "cache"])
@pytest.mark.parametrize(("number", "failure"), list(enumerate(FAILURES)))
def test_a_swap_that_cannot_be_compiled_is_served_otherwise(place: str, number: int, failure: str, monkeypatch):
    """One warning, one attempt, the result of another backend, and the reason for whoever asks for these kernels."""
    attempts = []

    def fail(*args: object, **more: object) -> None:
        attempts.append(1)
        raise FAILURES[failure]()

    monkeypatch.setattr(*((build, "_compile") if place == "compiler" else (cache, "library")), fail)
    swap = attnswap.Softpick(eps=0.02 + number / 1000 + (place == "cache") / 1e4)  # compiled nowhere else
    q, k, v = torch.randn(3, 1, 2, 9, 8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outs = [attnswap.attention(q, k, v, swap, is_causal=True) for _ in range(3)]
    ours = [str(w.message) for w in caught if "no native CPU kernels for Softpick" in str(w.message)]
    assert len(ours) == 1 and str(FAILURES[failure]()) in ours[0]
    assert len(attempts) == 1
    torch.testing.assert_close(outs[-1], attnswap.attention(q, k, v, swap, is_causal=True, backend="dense"))
    with pytest.raises(ConfigError, match="does not build"):
        attnswap.attention(q, k, v, swap, is_causal=True, backend="native")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("kill -9 $$", "killed by signal 9"),
        ("exit 3", "ended with 3"),
        ("echo 'fatal error: bad' >&2; exit 1", "fatal error: bad"),
        ("sleep 60", "has not ended"),
    ],
)
@posix
def test_what_a_bad_compiler_says(script: str, reason: str, tmp_path: Path, monkeypatch):
    program = tmp_path / "my c++"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{program}' --wrapped")
    monkeypatch.setattr(cache, "PATIENCE", 0.5 if "sleep" in script else 60.0)
    with pytest.raises(RuntimeError, match=reason):
        build._run([])


@posix
def test_the_group_knows_the_processor_and_the_compiler(tmp_path: Path, monkeypatch):
    """What the compiler would use is in the name, so that a home shared by several machines serves each its own."""
    program, groups = tmp_path / "c++", set()
    for answer in ("#define __AVX512F__ 1", "#define __AVX2__ 1", "#define __AVX2__ 1\n#define __GNUC__ 15"):
        program.write_text(f"#!/bin/sh\necho '{answer}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("CXX", str(program))
        groups.add(build._group.__wrapped__())
    assert len(groups) == 3
