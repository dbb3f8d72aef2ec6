"""Compiling kernels, and keeping their object code between processes.

Numba lowers a kernel, LLVM compiles it, and the object code is stored in a per-user folder: a later process loads it
without importing Numba. The file's name is a digest of everything that the code depends on: this package's source, the
program, the processor and the versions of the compilers; so an edited cell never meets an old kernel.

Settings, read when needed: FASTCELLS_CACHE, the folder (default: fastcells in the user's cache folder);
FASTCELLS_QUIET=1, no line on stderr while compiling.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import importlib.metadata
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import llvmlite.binding as llvm

from .host import host

SYMBOL = "fastcells_kernel"
FILE = re.compile(r".+-[0-9a-f]{32}\.(o|bc)")  # a name and a digest
Member = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)  # the frame: bytes or an address


@dataclass(frozen=True)
class Kernel:
    """Machine code: `call(frame, thread, team size)`, at `address`. compiled: seconds it took, 0 if stored."""

    name: str
    address: int
    call: Any
    compiled: float
    engine: Any  # owns the code


_kernels: dict[str, Kernel] = {}
_lock = threading.RLock()


def kernel(name: str, describe: Iterable[str], make: Callable[[], Callable]) -> Kernel:
    """The kernel that `make` returns as a Python function for Numba, compiled now, earlier, or by another process.

    describe: whatever the kernel depends on besides the package's source and the machine.
    """
    digest = _digest(name, *describe)
    found = _kernels.get(digest)
    if found is None:
        with _lock:
            found = _kernels.get(digest) or _obtain(name, digest, make)
            _kernels[digest] = found
    return found


def loaded() -> list[Kernel]:
    """The kernels in use in this process."""
    return list(_kernels.values())


def sources() -> list[Path]:
    """The files that machine code depends on; the rest of the package makes what is described to it."""
    root = Path(__file__).parent.parent
    return [
        root / "plan.py", root / "program.py", *sorted(root.glob("expression/*.py")), *sorted(root.glob("cpu/*.py"))
    ]  # fmt: skip


@lru_cache
def _base() -> str:
    """The part of every digest that is the same in this process: source, machine, versions."""
    source = hashlib.sha256()
    for file in sources():
        source.update(file.read_bytes())
    versions = [importlib.metadata.version(p) for p in ("numba", "llvmlite", "numpy")]
    return repr((source.hexdigest(), host(), versions, sys.version_info[:3]))


def _digest(*description: str) -> str:
    return hashlib.sha256("\0".join([_base(), *description]).encode()).hexdigest()


def _obtain(name: str, digest: str, make: Callable[[], Callable]) -> Kernel:
    return _load(name, *_kept(name, digest, ".o", lambda: compile_object(make())))


def _kept(name: str, digest: str, suffix: str, make: Callable[[], bytes]) -> tuple[bytes, float]:
    """What a file in the cache holds, or else what is made now, and kept there; and the seconds that making it took."""
    plain = re.sub(r"[^A-Za-z0-9_]", "_", name)[:100]  # names are anything that can be printed
    file = f"{plain}-{digest[:32]}{suffix}"
    for folder in folders():
        if (found := _read(folder / file)) is not None:
            return found, 0.0
    began = time.perf_counter()
    _announce()
    with _uncollected():
        made = make()
    for folder in folders():
        with suppress(OSError):
            _write(folder / file, made)
            break
    return made, time.perf_counter() - began


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for garbage in cycles, which goes through all of torch again and again: a tenth of the
    time that compiling takes."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@lru_cache  # one line a process
def _announce() -> None:
    if os.environ.get("FASTCELLS_QUIET", "") in ("", "0") and sys.stderr is not None:
        try:
            kept = f"once (kept in {place()})"
        except OSError as error:
            kept = f"which are not kept ({error})"
        print(f"fastcells: compiling kernels, {kept}", file=sys.stderr, flush=True)


# ---- compiling ----
class Linked(NamedTuple):
    """A kernel of a function that calls and reads what it does not define. text: LLVM's, which does."""

    function: Callable
    text: str


def compile_object(source: Callable | Linked) -> bytes:
    """Object code of `SYMBOL`, from a Python function of int64 that Numba can type, that returns one or nothing, and
    that never raises."""
    machine, module = _compile(source)
    return machine.emit_object(module)


def assembly(source: Callable | Linked) -> str:
    """The same to read."""
    machine, module = _compile(source)
    return machine.emit_assembly(module)


def _lower(function: Callable) -> Any:
    """The module of a function, `SYMBOL`, and of the routines that it calls, without any passes."""
    from .routine import ROUTINES

    module = _lowered(function, SYMBOL)
    while missing := [f.name for f in module.functions if f.is_declaration and f.name in ROUTINES]:
        for name in missing:
            module.link_in(_lowered(ROUTINES[name][0], name, ROUTINES[name][1]))
    return module


def _lowered(function: Callable, symbol: str, calls: str = "") -> Any:
    """The module that Numba makes of a function of integers: `symbol` calls it. calls: an attribute of `symbol`."""
    from numba import types
    from numba.core import compiler, config
    from numba.core.registry import cpu_target

    flags = compiler.Flags()
    flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    flags.nrt = False
    flags.no_rewrites = True  # they are for arrays and exceptions
    count = function.__code__.co_argcount
    level, config.OPT = config.OPT, config._OptLevel(0)  # Numba lowers only; the passes run once, on all that is linked
    try:
        result = compiler.compile_extra(
            cpu_target.typing_context, cpu_target.target_context, function, (types.int64,) * count, None, flags, {}
        )
    finally:
        config.OPT = level
    module = llvm.parse_assembly(str(result.library._final_module))
    native = result.fndesc.llvm_func_name
    module.get_function(native).add_function_attribute("alwaysinline")
    # Numba's calling convention returns a status and takes places for result and exception: the latter is never used;
    # the former is zeros before, since a truth value fills a part of it.
    entry = llvm.parse_assembly(
        f"""
        target triple = "{module.triple}"
        target datalayout = "{module.data_layout}"
        declare i32 @"{native}"({", ".join(["ptr", "ptr"] + ["i64"] * count)})
        define i64 @{symbol}({", ".join(f"i64 %{k}" for k in range(count))}) {calls} {{
            %result = alloca i64
            store i64 0, ptr %result
            %status = call i32 @"{native}"({", ".join(["ptr %result"] * 2 + [f"i64 %{k}" for k in range(count)])})
            %value = load i64, ptr %result
            ret i64 %value
        }}"""
    )
    module.link_in(entry)
    return module


@lru_cache
def _bitcode(function: Callable) -> bytes:
    """Of what kernels of many programs have in common."""
    name = function.__name__
    code, _ = _kept(name, _digest(name), ".bc", lambda: _lower(function).as_bitcode())
    return code


def _compile(source: Callable | Linked) -> tuple[Any, Any]:
    """The target machine, and the module after all passes."""
    if isinstance(source, Linked):
        module = llvm.parse_bitcode(_bitcode(source.function))
        text = f'target datalayout = "{module.data_layout}"\n' + source.text.replace('target datalayout = ""', "")
        module.link_in(llvm.parse_assembly(text))
    else:
        module = _lower(source)
    for defined in (*module.functions, *module.global_variables):
        if not defined.is_declaration and defined.name != SYMBOL:
            defined.linkage = "internal"
    machine = _target_machine()
    # The tile is vector code already; unrolling or vectorising around it only costs registers.
    tuning = llvm.create_pipeline_tuning_options(speed_level=1)
    tuning.loop_vectorization = tuning.slp_vectorization = tuning.loop_unrolling = False
    builder = llvm.create_pass_builder(machine, tuning)
    # First all is put together: LLVM's own order works through a function before it is inlined, and after that again.
    whole = llvm.create_new_module_pass_manager()
    whole.add_always_inliner_pass()
    whole.add_sroa_pass()
    whole.add_ipsccp_pass()
    whole.add_global_opt_pass()
    whole.add_global_dead_code_eliminate_pass()
    whole.run(module, builder)
    each = builder.getFunctionPassManager()
    for function in module.functions:
        if not function.is_declaration:
            each.run(function, builder)
    return machine, module


def _target_machine():
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(host().triple)
    return target.create_target_machine(
        cpu=host().cpu, features=host().features, opt=3, reloc="pic", codemodel="jitdefault"
    )


def _load(name: str, code: bytes, seconds: float) -> Kernel:
    empty = llvm.parse_assembly(f'target triple = "{host().triple}"')
    engine = llvm.create_mcjit_compiler(empty, _target_machine())
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    address = engine.get_function_address(SYMBOL)
    if not address:
        raise RuntimeError(f"kernel {name}: the compiled object has no {SYMBOL}")
    return Kernel(name, address, Member(address), seconds, engine)


# ---- files ----
def folders() -> list[Path]:
    """Where object code is looked for and stored, best first: the user's cache folder, then a private temporary one."""
    named = os.environ.get("FASTCELLS_CACHE")
    if named:
        return [Path(named)]
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    user = getattr(os, "getuid", lambda: "user")()
    return [Path(base) / "fastcells", Path(tempfile.gettempdir()) / f"fastcells-{user}"]


def place() -> Path:
    """The folder that new object code is stored in. Raises OSError where there is none: what is wrong with each."""
    wrong = []
    for folder in folders():
        probe = folder / ".probe"
        try:
            _write(probe, b"")
            probe.unlink(missing_ok=True)
            return folder
        except OSError as error:
            wrong.append(f"{folder}: {error.strerror}")
    raise OSError("; ".join(wrong))


def stored() -> dict[Path, int]:
    """The files in all folders, of this version and of others, and their bytes."""
    found = {}
    for folder in folders():
        with suppress(OSError):
            files = sorted(folder.iterdir()) if _trusted(folder) else []
            for file in files:
                if FILE.fullmatch(file.name):
                    with suppress(FileNotFoundError):  # another process may delete it meanwhile
                        found[file] = file.lstat().st_size
    return found


def clear() -> dict[Path, int]:
    """Delete all that is stored; what is gone. Those in use stay in memory. Raises OSError as `unlink`."""
    gone = stored()
    for file in gone:
        file.unlink(missing_ok=True)
    return gone


def _trusted(folder: Path) -> bool:
    """Code is loaded only from folders that nobody else may write to."""
    if not hasattr(os, "getuid"):
        return True
    status = folder.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o022


def _read(path: Path) -> bytes | None:
    """The stored object, or None where there is none that is whole."""
    try:
        if not _trusted(path.parent):
            return None
        data = path.read_bytes()
    except OSError:
        return None
    check, code = data[:32], data[32:]
    return code if hashlib.sha256(code).digest() == check else None


def _write(path: Path, code: bytes) -> None:
    """Store an object so that no other process ever sees half of it. Raises OSError where it cannot be stored."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _trusted(path.parent):
        raise PermissionError(errno.EPERM, "others own it or may write to it (chmod go-w)")
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(hashlib.sha256(code).digest() + code)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
