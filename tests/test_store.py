"""Kernels between processes: the store of object code, and everything that may be wrong with its folder."""

import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest

from fastcells.cpu import store
from fastcells.cpu.host import Host

PACKAGE = Path(store.__file__).parent.parent


def kernel_source(value: str) -> str:
    """A Python program that obtains a small kernel, runs it and prints what it wrote and whether Numba was imported."""
    return textwrap.dedent(f"""
        import ctypes, sys
        from fastcells.cpu import store

        def make():
            from numba import types
            from numba.extending import intrinsic
            from fastcells.cpu.simd import I64, i64

            @intrinsic
            def poke(typingctx, address, number):
                def emit(context, b, signature, args):
                    b.store(args[1], b.inttoptr(args[0], I64.as_pointer()))
                    return context.get_dummy_value()
                return types.void(types.int64, types.int64), emit

            def member(frame, thread, team):
                poke(frame, {value})
            return member

        word = ctypes.c_int64(0)
        kernel = store.kernel("probe", [{value!r}], make)
        kernel.call(ctypes.addressof(word), 0, 1)
        print(word.value, "numba" in sys.modules, kernel.compiled > 0)
    """)


def start(value: str, **environment) -> subprocess.Popen:
    env = {k: v for k, v in os.environ.items() if k not in ("FASTCELLS_QUIET", "FASTCELLS_CACHE")} | environment
    return subprocess.Popen(
        [sys.executable, "-c", kernel_source(value)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip(), err.strip()


def test_stored_once_then_loaded_without_numba(tmp_path):
    cache = {"FASTCELLS_CACHE": str(tmp_path)}
    out, err = finish(start("41", **cache))
    assert out == "41 True True"
    assert err == f"fastcells: compiling kernels, once (kept in {tmp_path})"
    out, err = finish(start("41", **cache))
    assert (out, err) == ("41 False False", "")
    out, err = finish(start("42", FASTCELLS_QUIET="1", **cache))  # other content under the same name
    assert (out, err) == ("42 True True", "")


def test_two_processes_that_start_cold_at_once(tmp_path):
    cache = {"FASTCELLS_CACHE": str(tmp_path)}
    both = [start("7", **cache), start("7", **cache)]
    assert [finish(p)[0].split()[0] for p in both] == ["7", "7"]
    assert [f.suffix for f in tmp_path.iterdir()] == [".o"]


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1])])
def test_a_damaged_file_is_compiled_again(tmp_path, damage):
    cache = {"FASTCELLS_CACHE": str(tmp_path)}
    finish(start("9", **cache))
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert finish(start("9", **cache))[0] == "9 True True"
    assert finish(start("9", **cache))[0] == "9 False False"


def test_a_home_that_cannot_be_written_to(tmp_path):
    """The private temporary folder is next; where that cannot be written either, kernels live in the process."""
    (tmp_path / "home").write_text("a file where a folder should be")
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path)}
    assert finish(start("3", **home))[0] == "3 True True"
    assert finish(start("3", **home))[0] == "3 False False"
    nowhere = {**home, "TMPDIR": "/proc", "FASTCELLS_CACHE": "/proc/fastcells"}
    out, err = finish(start("3", **nowhere))
    assert out == "3 True True"
    assert re.fullmatch(r"fastcells: compiling kernels, which are not kept \(/proc/fastcells: .+\)", err)


def test_a_full_disk(tmp_path, monkeypatch):
    """Writing fails half-way: the kernel still runs, and no part of a file stays."""

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "replace", full)
    monkeypatch.setenv("FASTCELLS_CACHE", str(tmp_path))
    with pytest.raises(OSError, match="No space left"):
        store._write(tmp_path / "kernel.o", b"code")
    assert store._kept("kernel", "0" * 64, ".o", lambda: b"code")[0] == b"code"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="folders have no owner on this system")
def test_code_is_not_loaded_from_a_folder_that_others_may_write_to(tmp_path):
    path = tmp_path / "kernel.o"
    store._write(path, b"code")
    assert store._read(path) == b"code"
    tmp_path.chmod(0o777)
    assert store._read(path) is None
    with pytest.raises(PermissionError, match="others own it or may write to it"):
        store._write(path, b"code")


def test_files_that_are_not_there_any_more(tmp_path, monkeypatch):
    """A link to nowhere is deleted as other files are; what another process deletes meanwhile is none."""
    monkeypatch.setenv("FASTCELLS_CACHE", str(tmp_path))
    link = tmp_path / f"kernel-{'0' * 32}.o"
    link.symlink_to("/nowhere")
    assert [*store.stored()] == [link]
    assert [*store.clear()] == [link]
    assert [*tmp_path.iterdir()] == []
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([link]))
    assert store.stored() == store.clear() == {}


WIDE = {
    "avx512": Host(
        "x86_64-unknown-linux-gnu", "skylake-avx512", "+avx,+avx2,+fma,+avx512f,+avx512vl,+avx512dq", 64, 32
    ),
    "avx2": Host("x86_64-unknown-linux-gnu", "haswell", "+avx,+avx2,+fma", 32, 16),
    "plain": Host("x86_64-unknown-linux-gnu", "generic", "", 16, 16),
}


@pytest.mark.parametrize(
    ("units", "lanes"), [(4, 8), (8, 8), (9, 16), (16, 16), (17, 8), (24, 8), (25, 16), (40, 16), (64, 16), (None, 16)]
)
def test_few_units_take_narrower_vectors_where_wide_ones_pass_in_halves(units, lanes):
    assert replace(WIDE["avx512"], halves=True).lanes(4, units) == lanes
    assert WIDE["avx512"].lanes(4, units) == 16


@pytest.mark.skipif(not llvm.get_process_triple().startswith("x86_64"), reason="code for another architecture")
@pytest.mark.parametrize("kind", WIDE)
def test_every_vector_width_compiles(kind, monkeypatch):
    """Widths that this processor lacks cannot run here, but their code can be made."""
    from fastcells.cpu.engine import PRODUCT
    from fastcells.cpu.loops import make_recurrence

    store._base()  # of this machine, once and for all
    monkeypatch.setattr(store, "host", lambda: WIDE[kind])
    lanes = WIDE[kind].lanes(4)
    code = store.compile_object(make_recurrence(PRODUCT, "float32", WIDE[kind].registers, lanes))
    assert len(code) > 1000


def test_digest_covers_source_machine_and_versions():
    base = store._base()
    assert store.host().cpu in base
    for package in ("numba", "llvmlite", "numpy"):
        assert store.importlib.metadata.version(package) in base
    sources = {f.relative_to(PACKAGE).as_posix() for f in store.sources()}
    assert {"cpu/tile.py", "cpu/loops.py", "cpu/simd.py", "cpu/frame.py", "expression/graph.py"} <= sources
    for file in (PACKAGE / "cpu").glob("*.py"):
        if "import ir\n" in (text := file.read_text()):  # it makes code, also of what it takes from elsewhere
            assert {f"{name}.py" for name in re.findall(r"^from \.\.(\w+) import", text, re.M)} <= sources | {
                "expression.py"  # a folder
            }


@pytest.mark.parametrize("name", ["../outside", "a/b", "<lambda>", "long" * 100, "a b", "ü"])
def test_a_kernel_of_any_name_is_kept_in_the_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("FASTCELLS_CACHE", str(tmp_path / "cache"))
    assert store._kept(name, "0" * 64, ".o", lambda: b"made")[0] == b"made"
    assert store._kept(name, "0" * 64, ".o", lambda: pytest.fail("made once more")) == (b"made", 0)
    assert [*tmp_path.iterdir()] == [tmp_path / "cache"]
    assert len(store.stored()) == 1


def test_import_does_not_bring_numba():
    probe = "import sys, fastcells, fastcells.nn; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr


def test_routines_are_put_together(tmp_path, monkeypatch):
    """Those that a kernel calls, directly or not, and each once, whether inlined or called."""
    from fastcells.cpu.loops import peek, poke
    from fastcells.cpu.routine import routine, seldom

    @routine
    def square(n):
        return n * n

    @routine
    def is_large(n):
        return square(n) > 100

    @seldom
    def put(address, n):
        for k in range(n):
            poke(address, k + 1, square(k) if is_large(k) else -k)

    def member(frame, thread, team):
        put(frame, peek(frame, 0) + square(thread))

    monkeypatch.setenv("FASTCELLS_CACHE", str(tmp_path))
    words = np.zeros(20, np.int64)
    words[0] = 9
    kernel = store.kernel("probe", ["routines"], lambda: member)
    kernel.call(words.ctypes.data, 2, 3)
    assert words.tolist() == [9, *(n * n if n > 10 else -n for n in range(13)), *[0] * 6]
