"""The functions that Numba lacks and CUDA kernels call: vectors of 128 bits, pointers into global memory."""

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from .table import VECTOR


def _count(pointer):
    """How many elements a vector has."""
    return VECTOR // (pointer.dtype.bitwidth // 8)


@intrinsic
def load(typing, pointer, at):
    """The 128-bit vector at pointer + at, as a tuple."""
    signature = types.UniTuple(pointer.dtype, _count(pointer))(pointer, at)

    def lower(context, builder, signature, values):
        vector = builder.load(_vector_pointer(builder, values, _count(pointer)), align=VECTOR)
        lanes = [builder.extract_element(vector, ir.Constant(ir.IntType(32), k)) for k in range(_count(pointer))]
        return context.make_tuple(builder, signature.return_type, lanes)

    return signature, lower


@intrinsic
def store(typing, pointer, at, lanes):
    """Write a tuple as the 128-bit vector at pointer + at."""

    def lower(context, builder, signature, values):
        where = _vector_pointer(builder, values, _count(pointer))
        vector = ir.Constant(where.type.pointee, ir.Undefined)
        for k in range(_count(pointer)):
            vector = builder.insert_element(vector, builder.extract_value(values[2], k), ir.Constant(ir.IntType(32), k))
        builder.store(vector, where, align=VECTOR)
        return context.get_dummy_value()

    return types.void(pointer, at, lanes), lower


@intrinsic
def address(typing, pointer):
    """The address in a pointer, as an integer."""

    def lower(context, builder, signature, values):
        return builder.ptrtoint(values[0], ir.IntType(64))

    return types.uint64(pointer), lower


def _vector_pointer(builder, values, count):
    where = builder.gep(values[0], [values[1]])
    return builder.bitcast(where, ir.VectorType(where.type.pointee, count).as_pointer())


def pointer_to(real):
    """pointer(address), which makes a pointer to numbers in global memory (addrspace 1: plain LDG, not a generic load)."""

    @intrinsic
    def pointer(typing, address):
        def lower(context, builder, signature, values):
            kind = context.get_value_type(real)
            there = builder.inttoptr(values[0], ir.PointerType(kind, 1))
            return builder.addrspacecast(there, ir.PointerType(kind))

        return types.CPointer(real)(address), lower

    return pointer
