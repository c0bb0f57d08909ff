"""How the extension fastrms/_core is compiled (cffi, API mode).  Runs in the project root."""

import glob

from cffi import FFI

with open("csrc/flags") as lines:
    flags = [word for line in lines for word in line.partition("#")[0].split()]

ffibuilder = FFI()
for name in ("fastrms_decl.h", "testing_decl.h"):
    with open(f"csrc/{name}") as declarations:
        ffibuilder.cdef(declarations.read())
ffibuilder.cdef('extern "Python" int fastrms_gather(fastrms_shards *shards);')  # in fastrms/backends/c.py
ffibuilder.set_source(
    "fastrms._core",
    '#include "fastrms.h"\n#include "testing_decl.h"\n',
    sources=sorted(glob.glob("csrc/*.c")),
    include_dirs=["csrc"],
    depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*.inc")) + ["csrc/build_ffi.py", "csrc/flags"],
    libraries=["m"],
    extra_compile_args=flags,
    extra_link_args=["-pthread"],
)
