"""How the extension fastrms/_core is compiled (cffi, API mode).  Runs in the project root."""

import glob
import json
import os
import runpy

from cffi import FFI

with open("csrc/flags") as lines:
    flags = [word for line in lines for word in line.partition("#")[0].split()]
facts = {  # what the extension knows of itself; in its own C file, so that it is compiled anew whenever they change
    "sources": runpy.run_path("csrc/fingerprint.py")["fingerprint"]("csrc"),
    "flags": " ".join([*os.environ.get("CFLAGS", "").split(), *flags]),
}

ffibuilder = FFI()
for name in ("fastrms_decl.h", "testing_decl.h"):
    with open(f"csrc/{name}") as declarations:
        ffibuilder.cdef(declarations.read())
ffibuilder.cdef('extern "Python" int fastrms_gather(fastrms_shards *shards);')  # in fastrms/backends/c.py
ffibuilder.cdef("".join(f"extern const char fastrms_built_{name}[];\n" for name in facts))
ffibuilder.set_source(
    "fastrms._core",
    '#include "fastrms.h"\n#include "testing_decl.h"\n'
    + "".join(f"static const char fastrms_built_{name}[] = {json.dumps(text)};\n" for name, text in facts.items()),
    sources=sorted(glob.glob("csrc/*.c")),
    include_dirs=["csrc"],
    depends=sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*.inc") + glob.glob("csrc/*.py")) + ["csrc/flags"],
    libraries=["m"],
    extra_compile_args=flags,
    extra_link_args=["-pthread"],
)
