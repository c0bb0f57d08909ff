"""The functions that Numba lacks and CUDA kernels call: vectors, pointers into global memory."""

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic


def vectors(count):
    """(load, store), which move `count` elements of a buffer at once, at an address that is a multiple of their size."""

    @intrinsic
    def load(typing, pointer, at):
        """The vector at pointer + at, as a tuple."""
        signature = types.UniTuple(pointer.dtype, count)(pointer, at)

        def lower(context, builder, signature, values):
            vector = builder.load(_vector_pointer(builder, values, count), align=count * pointer.dtype.bitwidth // 8)
            lanes = [builder.extract_element(vector, ir.Constant(ir.IntType(32), k)) for k in range(count)]
            return context.make_tuple(builder, signature.return_type, lanes)

        return signature, lower

    @intrinsic
    def store(typing, pointer, at, lanes):
        """Write a tuple as the vector at pointer + at."""

        def lower(context, builder, signature, values):
            where = _vector_pointer(builder, values, count)
            vector = ir.Constant(where.type.pointee, ir.Undefined)
            for k in range(count):
                lane = builder.extract_value(values[2], k)
                vector = builder.insert_element(vector, lane, ir.Constant(ir.IntType(32), k))
            builder.store(vector, where, align=count * pointer.dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(pointer, at, lanes), lower

    return load, store


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
