"""Runs a module on the driver double: `python tests/ptx/on_double.py pytest -m gpu tests/test_gpu.py`"""

import os
import runpy
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ["FASTRMS_DRIVER_DOUBLE"] = "1"

import double  # noqa: E402

DRIVER = double.start()  # before anything asks for a driver

from fastrms.backends.cuda import toolchain  # noqa: E402


def main():
    DRIVER.learn_from(toolchain.compiler())
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
