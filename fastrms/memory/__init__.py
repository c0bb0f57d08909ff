"""Where numbers lie: arrays of the host (host) and of a GPU (device), named arrays in one buffer (flat), where buffers start
(placement), the shapes that params and grads may have (tree), and what a refusal says to do instead (remedies).

An optimizer uses either host or device as its memory module.  Both offer the same functions:

acquire(x, name, writable=, halves=, wanted=)   the Buffer of an array-like x; TypeError or ValueError, with a sentence that
                                calls x `name`; halves: whether x may be bf16 or fp16; wanted: the dtype that remedies name
again(buffer, name)             the Buffer of a torch tensor that may have been given other memory since
same_layout(buffer, name, reference, reference_name, dtypes)    raises unless both have one shape, memory order and device,
                                and one dtype or the buffer one of dtypes
same_device(buffers, names)     raises unless all Buffers are on one device
wrote(buffers)                  tells the owners of these Buffers that their memory was written (torch counts that)
place_beside(param, others, size, dtype)        a new uninitialised flat array like the Buffer param, or of another size and
                                dtype, to run beside it and the flat others; fill(value) fills it
ours(array)                     the Buffer of an array that fastrms allocated itself, which needs no check
on_host(array)                  the numbers of such an array as a NumPy array in host memory
copy(to, source)                copies between such arrays, and NumPy arrays

A Buffer is a dense array.  It has the attributes owner (the object that it came from, which is kept alive by it), address
(of its first byte), end (the address after its last byte), size (in elements), dtype, shape, strides (in elements, 0 for an
axis of length 1), and flat (its numbers in memory order; flat.fill(value) fills them).  A Buffer of the device also has
device and stream.
"""
