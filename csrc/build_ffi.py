"""How the extension fastrms/_core is compiled (cffi, API mode).  Runs in the project root."""

import glob

from cffi import FFI

with open("csrc/flags") as lines:
    flags = [word for line in lines for word in line.partition("#")[0].split()]

with open("csrc/fastrms_decl.h") as declarations:
    cdef = declarations.read()

ffibuilder = FFI()
ffibuilder.cdef(cdef)
ffibuilder.set_source(
    "fastrms._core",
    '#include "fastrms.h"\n',
    sources=sorted(glob.glob("csrc/*.c")),
    include_dirs=["csrc"],
    depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*.inc")) + ["csrc/build_ffi.py", "csrc/flags"],
    libraries=["m"],
    extra_compile_args=flags,
    extra_link_args=["-pthread"],
)
