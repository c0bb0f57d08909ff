"""The functions that Numba lacks and kernels call: memory by its address, prefetching, the floating-point mode, threads.

Numba compiles these into every kernel.  The text of this file is in the key of each kernel that is kept on disk.
"""

from llvmlite import ir
from numba import int64, types
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic
from numpy import uintp

WORD = types.intp

# functions of glibc
IEEE = uintp(2**64 - 1)  # FE_DFL_MODE
fegetmode, fesetmode = (types.ExternalFunction(name, types.intc(types.uintp)) for name in ("fegetmode", "fesetmode"))

# Numba's own functions of these names would keep a kernel from being cached on disk
get_num_threads = types.ExternalFunction("get_num_threads", WORD())
set_num_threads = types.ExternalFunction("set_num_threads", types.void(types.intc))


def _element(context, builder, real, address, index):
    """A pointer to element `index` of the numbers at an address."""
    return builder.gep(builder.inttoptr(address, context.get_value_type(real).as_pointer()), [index])


def _apart(builder, access, name, buffers):
    """Tell LLVM that no two of these buffers share a byte."""
    known = builder.module.add_metadata
    scopes = {buffer: known([buffer, known(["fastrms"])]) for buffer in buffers}
    access.set_metadata("alias.scope", known([scopes.pop(name)]))
    access.set_metadata("noalias", known(list(scopes.values())))
    return access


def stream(name, buffers, real):
    """(load, store) of elements of the buffer `name`: load(address, index), store(address, index, value)."""

    @intrinsic
    def load(typing, address, index):
        def code(context, builder, signature, arguments):
            return _apart(builder, builder.load(_element(context, builder, real, *arguments)), name, buffers)

        return real(WORD, WORD), code

    @intrinsic
    def store(typing, address, index, value):
        def code(context, builder, signature, arguments):
            to = _element(context, builder, real, *arguments[:2])
            _apart(builder, builder.store(arguments[2], to), name, buffers)
            return context.get_dummy_value()

        return types.void(WORD, WORD, real), code

    return load, store


def reader(kind):
    """read(address, index) for numbers or words that no kernel writes."""

    @intrinsic
    def read(typing, address, index):
        def code(context, builder, signature, arguments):
            return builder.load(_element(context, builder, kind, *arguments))

        return kind(WORD, WORD), code

    return read


integer = reader(WORD)


@intrinsic
def ask(typing, address):
    """Prefetch the cache line at an address into all caches, for reading."""

    def code(context, builder, signature, arguments):
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        prototype = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", [byte], prototype)
        to_read, all_caches, data = flag(0), flag(3), flag(1)
        builder.call(prefetch, [builder.inttoptr(arguments[0], byte), to_read, all_caches, data])
        return context.get_dummy_value()

    return types.void(WORD), code


@intrinsic
def take(typing, address):
    """Fetch and add: the 64-bit counter at an address, which is raised by one in the same atomic operation."""

    def code(context, builder, signature, arguments):
        counter = ir.IntType(64)
        where = builder.inttoptr(arguments[0], counter.as_pointer())
        return builder.atomic_rmw("add", where, counter(1), "monotonic")

    return int64(WORD), code


@intrinsic
def room(typing):
    """The address of 64 bytes on the stack."""

    def code(context, builder, signature, arguments):
        return builder.ptrtoint(alloca_once(builder, ir.IntType(64), size=8), context.get_value_type(types.uintp))

    return types.uintp(), code
