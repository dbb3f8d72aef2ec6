"""The method that makes a call again (see `again`), compiled by Numba: a function in terms of Python's interface for C,
where objects are addresses. The references that it takes it gives back, or on.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .again import FRAMES_ROOM, LAYOUT, MADE, NOTHING, RECORD, ROOM
from .intrinsics import call, copy_words, peek, poke
from .routine import routine
from .simd import I64

WORD, STATUS, NONE = types.int64, types.int32, types.void
TYPE = 1  # the word of an object that has its type, as in Python's stable interface


def _external(name: str, arguments: int, returns: types.Type = WORD) -> types.ExternalFunction:
    return types.ExternalFunction(name, returns(*[WORD] * arguments))


hold = _external("Py_IncRef", 1, NONE)
let_go = _external("Py_DecRef", 1, NONE)
clear_error = _external("PyErr_Clear", 0, NONE)
answer = _external("PyObject_CallNoArgs", 1)
vectorcall = _external("PyObject_Vectorcall", 4)
integer = _external("PyLong_AsSsize_t", 1)
content = _external("PyCell_Get", 1)
dict_size = _external("PyDict_Size", 1)
dict_item = _external("PyDict_GetItemWithError", 2)
new_tuple = _external("PyTuple_New", 1)
tuple_size = _external("PyTuple_Size", 1)
tuple_item = _external("PyTuple_GetItem", 2)
set_item = _external("PyTuple_SetItem", 3, STATUS)
thread_dict = _external("PyThreadState_GetDict", 0)
release = _external("PyEval_SaveThread", 0)
acquire = _external("PyEval_RestoreThread", 1, NONE)
new_tensor = types.ExternalFunction("aoti_torch_empty_strided", STATUS(WORD, WORD, WORD, STATUS, STATUS, STATUS, WORD))
data_pointer = _external("aoti_torch_get_data_ptr", 2, STATUS)
dtype_of = _external("aoti_torch_get_dtype", 2, STATUS)
dimensions_of = _external("aoti_torch_get_dim", 2, STATUS)
sizes_of = _external("aoti_torch_get_sizes", 2, STATUS)
strides_of = _external("aoti_torch_get_strides", 2, STATUS)
wants_gradient = _external("requires_grad", 1, types.uint8)
drop_tensor = _external("aoti_torch_delete_tensor_object", 1, STATUS)
wrap = _external("THPVariable_Wrap", 1)


@intrinsic
def ask(typingctx, function):
    """What a function without arguments returns, by its address."""

    def emit(context, b, signature, args):
        return b.call(b.inttoptr(args[0], ir.FunctionType(I64, []).as_pointer()), [])

    return WORD(WORD), emit


def _word(name: str) -> Callable:
    """An intrinsic that reads a word of a record."""
    index = RECORD.index(name)

    @intrinsic
    def read(typingctx, record):
        def emit(context, b, signature, args):
            return b.load(b.inttoptr(b.add(args[0], I64(8 * index)), I64.as_pointer()))

        return WORD(WORD), emit

    return read


none, true, given = map(_word, ("none", "true", "given"))
entries, entries_end = map(_word, ("entries", "entries_end"))
empty, empty_end = map(_word, ("empty", "empty_end"))
input_kind, parts = map(_word, ("input", "parts"))
parameters, names, names_end = map(_word, ("parameters", "names", "names_end"))
kind, states = map(_word, ("kind", "states"))
offset, keys, layouts = map(_word, ("offset", "keys", "layouts"))
numbers, numbers_end = map(_word, ("numbers", "numbers_end"))
guards, guarded = map(_word, ("guards", "guarded"))
make, make_end = map(_word, ("make", "make_end"))
arena, size, take = map(_word, ("arena", "size", "take"))
frames, length = map(_word, ("frames", "length"))
moves, moves_end = map(_word, ("moves", "moves_end"))
brief, flying = map(_word, ("brief", "flying"))
FLYING = RECORD.index("flying")
runs, runs_end = map(_word, ("runs", "runs_end"))
driver, lead, team = map(_word, ("driver", "lead", "team"))
result, result_end = map(_word, ("result", "result_end"))


def _room(words: int) -> Callable:
    """An intrinsic: the address of so many words, which last as long as the function that asks for them runs."""

    @intrinsic
    def room(typingctx):
        def emit(context, b, signature, args):
            with b.goto_entry_block():
                return b.ptrtoint(b.alloca(ir.ArrayType(I64, words)), I64)

        return WORD(), emit

    return room


room, frames_room, word = map(_room, (ROOM, FRAMES_ROOM, 1))


@routine
def as_before(record):
    """Whether all but the arguments is as it has to be."""
    at = entries(record)
    while at < entries_end(record):
        key = peek(at, 1)
        found = dict_item(peek(at, 0), key) if key != 0 else content(peek(at, 0))
        if key == 0 and found != 0:
            let_go(found)  # it lives on: the record has it, or it is another one
        if found != peek(at, 2):
            return False
        at += 24
    at = empty(record)
    while at < empty_end(record):
        if dict_size(peek(at, 0)) != 0:
            return False
        at += 8
    return True


@routine
def gathered(record, args, count, tensors):
    """How many tensors the call has, input, states, and parameters in order, whose addresses are written down; 0 where
    they are others than before."""
    hx = peek(args, 2) if count == 3 else none(record)
    if peek(hx, TYPE) != kind(record):
        return 0
    several, n = peek(args, 1), 0
    if parts(record) == 0:
        poke(tensors, 0, several)
        n = 1
    elif peek(several, TYPE) != input_kind(record):
        return 0
    else:
        for k in range(tuple_size(several)):
            part = tuple_item(several, k)
            if k < parts(record):
                poke(tensors, k, part)
                n += 1
            elif part != none(record):
                return 0
    if states(record) < 0:
        poke(tensors, n, hx)
        n += 1
    elif states(record) > 0:
        if tuple_size(hx) != states(record):
            return 0
        for k in range(states(record)):
            poke(tensors, n, tuple_item(hx, k))
            n += 1
    at = names(record)
    while at < names_end(record):
        found = dict_item(parameters(record), peek(at, 0))
        if found == 0:
            return 0
        poke(tensors, n, found)
        n += 1
        at += 8
    return n


@routine
def address_of(handle):
    """Of a tensor's first element."""
    place = word()
    data_pointer(handle, place)
    return peek(place, 0)


@routine
def equal(words, others, count):
    """Whether so many words are those at another address."""
    k = 0
    while k < count and peek(words, k) == peek(others, k):
        k += 1
    return k == count


@routine
def alike(record, tensors, count):
    """Whether tensors are laid out as before, and torch is in the same state."""
    if layouts(record) == 0:
        return True
    at = numbers(record)
    while at < numbers_end(record):
        if ask(peek(at, 0)) & peek(at, 1) != peek(at, 2):
            return False
        at += 24
    at, place = layouts(record), word()
    for k in range(count):
        tensor = peek(tensors, k)
        if peek(tensor, TYPE) != peek(at, 0):
            return False
        handle = tensor + offset(record)
        impl = peek(handle, 0)
        if peek(impl + keys(record), 0) != peek(at, 1) or wants_gradient(impl) != peek(at, 2):
            return False
        if address_of(handle) == 0:  # its memory was let go
            return False
        poke(place, 0, 0)
        dtype_of(handle, place)
        if peek(place, 0) != peek(at, 3):
            return False
        dimensions_of(handle, place)
        free, dimensions = peek(at, 4), peek(at, 5)
        if peek(place, 0) != dimensions:
            return False
        at += 8 * len(LAYOUT)
        sizes_of(handle, place)
        if not equal(peek(place, 0) + 8 * free, at + 8 * free, dimensions - free):
            return False
        strides_of(handle, place)
        apart = free - 1 if free > 0 else 0  # which go by the sizes that follow
        if not equal(peek(place, 0) + 8 * apart, at + 8 * (dimensions + apart), dimensions - apart):
            return False
        at += 16 * dimensions
    poke(place, 0, guarded(record))
    found = vectorcall(guards(record), place, 1, 0)
    if found == 0:
        return False
    let_go(found)  # it lives on
    return found == true(record)


@routine
def held(address):
    """An object, as what a function returns."""
    hold(address)
    return address


@routine
def listed(tensors, count):
    """A tuple of the tensors."""
    for k in range(count):
        hold(peek(tensors, k))  # before anything new, for which Python may collect what is old
    several = new_tuple(count)
    for k in range(count):
        set_item(several, k, peek(tensors, k))
    return several


@routine
def own_memory(record):
    """The address of the thread's own memory, or 0 for an error of Python's."""
    things = thread_dict()
    found = 0 if things == 0 else dict_item(things, arena(record))
    if found != 0:
        block = integer(found)
        if peek(block, 1) >= size(record):
            return peek(block, 0)
    found = answer(take(record))
    if found == 0:
        return 0
    address = integer(found)
    let_go(found)
    return address


@routine
def made(record, own_memory, addresses, handles):
    """Make what the call makes: how many tensors, or, where one could not be made, -1 less those before it. Their
    handles are written down, and the addresses of all."""
    at, n = make(record), 0
    while at < make_end(record):
        dimensions, address = peek(at, 0), own_memory + peek(at, 1)
        if dimensions >= 0:
            if new_tensor(dimensions, peek(at, 1), peek(at, 2), peek(at, 3), 0, 0, handles + 8 * n) != 0:
                return -1 - n
            address = address_of(peek(handles, n))
            n += 1
        poke(addresses, 0, address)
        addresses += 8
        at += 8 * len(MADE)
    poke(addresses, 0, own_memory)
    return n


@routine
def filled(record, addresses, scripts):
    """Write the scripts' frames."""
    copy_words(scripts, frames(record), length(record))
    at = moves(record)
    while at < moves_end(record):
        poke(scripts, peek(at, 0), peek(addresses, peek(at, 1)) + peek(at, 2))
        at += 24


@routine
def run(record, scripts):
    """Run the scripts, while Python's other threads go on, if that pays."""
    state = release() if brief(record) == 0 else 0
    at = runs(record)
    while at < runs_end(record):
        script, threads = scripts + 8 * peek(at, 0), peek(at, 1)
        if threads == 1:
            call(driver(record), script, 0, 1)
        else:
            call(lead(record), script, team(record), driver(record))
        at += 16
    if state != 0:
        acquire(state)


@routine
def arranged(record, objects, stack):
    """The objects as the call returns them."""
    at, n = result(record), 0
    while at < result_end(record):
        code = peek(at, 0)
        if code == NOTHING:
            one = held(none(record))
        elif code >= 0:
            one = peek(objects, code)
        else:
            one = new_tuple(-code)
            n += code
            for k in range(-code):
                set_item(one, k, peek(stack, n + k))
        poke(stack, n, one)
        n += 1
        at += 8
    return peek(stack, 0)


def make_recall() -> Callable:
    """The method, of its owner, the address of its arguments (tensors, or a module, an input, and states if there are
    any), and their count."""

    def recall(owner, args, count):
        record = integer(tuple_item(owner, 0))
        nothing = none(record)
        tensors, addresses, handles, scripts = room(), room(), room(), frames_room()
        taken, block = 0, 0
        if runs(record) != runs_end(record):
            block = own_memory(record)  # first, since it may take Python, and then other threads go on
            if block == 0:
                return 0
        if given(record) != 0:
            if count == given(record):
                taken = count
                for k in range(count):
                    poke(tensors, k, peek(args, k))
        elif (count == 2 or count == 3) and as_before(record):
            taken = gathered(record, args, count, tensors)
        if taken == 0 or not alike(record, tensors, taken):
            clear_error()
            return held(nothing)
        if block == 0:
            return listed(tensors, taken)
        alone = flying(record)
        if alone == 1:
            return held(nothing)
        if alone == 0:
            poke(record, FLYING, 1)
        shared = brief(record) == 0
        for k in range(taken):
            if shared:
                hold(peek(tensors, k))  # whatever other threads do to the module
            poke(addresses, k, address_of(peek(tensors, k) + offset(record)))
        n = made(record, block, addresses + 8 * taken, handles)
        whole = n >= 0
        if not whole:
            n = -1 - n
        if whole:
            filled(record, addresses, scripts)
            run(record, scripts)
        if alone == 0:
            poke(record, FLYING, 0)
        if shared:
            for k in range(taken):
                let_go(peek(tensors, k))
        for k in range(n):
            if whole:
                poke(tensors, k, wrap(peek(handles, k)))
            drop_tensor(peek(handles, k))
        return arranged(record, tensors, handles) if whole else held(nothing)

    return recall
