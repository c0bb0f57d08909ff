"""Builds the C extension; everything else is in pyproject.toml.  FASTRMS_NO_EXT=1 leaves C out on purpose."""

import os
import shutil
import sysconfig

from setuptools import setup

os.makedirs("fastrms/include", exist_ok=True)
for header in ("fastrms.h", "fastrms_decl.h"):  # the public interface, for fastrms.get_include()
    shutil.copyfile(f"csrc/{header}", f"fastrms/include/{header}")

without_c = os.environ.get("FASTRMS_NO_EXT") == "1"
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # no stable ABI there

try:
    setup(
        cffi_modules=[] if without_c else ["csrc/build_ffi.py:ffibuilder"],
        options={} if without_c or free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )
except SystemExit as error:
    raise SystemExit(f"{error}\nfastrms needs a C compiler; FASTRMS_NO_EXT=1 builds it without C, much slower") from None
