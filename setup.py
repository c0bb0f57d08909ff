"""Builds the C extension; everything else is in pyproject.toml.  FASTRMS_NO_EXT=1 leaves C out on purpose."""

import os
import shutil
import sys
import sysconfig

from setuptools import setup

os.makedirs("fastrms/include", exist_ok=True)
for header in ("fastrms.h", "fastrms_decl.h"):  # the public interface, for fastrms.get_include()
    shutil.copyfile(f"csrc/{header}", f"fastrms/include/{header}")

without_c = os.environ.get("FASTRMS_NO_EXT") == "1"
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))  # the stable ABI of these, abi3t, begins with 3.15
stable = "cp310" if not free_threaded else "cp315" if sys.version_info >= (3, 15) else None

try:
    setup(
        cffi_modules=[] if without_c else ["csrc/build_ffi.py:ffibuilder"],
        options={} if without_c or stable is None else {"bdist_wheel": {"py_limited_api": stable}},
    )
except SystemExit as error:
    raise SystemExit(f"{error}\nfastrms needs a C compiler; FASTRMS_NO_EXT=1 builds it without C, much slower") from None
