"""How the extension fastrms/_core is compiled (cffi, API mode).  Runs in the project root."""

import glob

from cffi import FFI

# The order matters: -fno-fast-math first, or it turns errno back on and nothing vectorises.
FLAGS = [
    "-O3",  # -O2 of gcc 12 vectorises only what has a constant length: the tiles, not their tails
    "-fno-fast-math",  # a user's CFLAGS=-ffast-math must not reach the kernels
    "-fno-math-errno",  # a sqrt that may set errno stays a call
    "-fno-trapping-math",  # a compare-select may become a blend
    "-ffp-contract=off",  # a*b + c rounds twice, everywhere
    "-fvisibility=hidden",
    "-g0",
    "-pthread",
]

with open("csrc/fastrms_decl.h") as declarations:
    cdef = declarations.read()

ffibuilder = FFI()
ffibuilder.cdef(cdef)
ffibuilder.set_source(
    "fastrms._core",
    '#include "fastrms.h"\n',
    sources=sorted(glob.glob("csrc/*.c")),
    include_dirs=["csrc"],
    depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*.inc")) + ["csrc/build_ffi.py"],
    libraries=["m"],
    extra_compile_args=FLAGS,
    extra_link_args=["-pthread"],
)
