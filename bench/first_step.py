"""How long the first step of the Numba backend takes, without its cache on disk and with it, in processes of their own."""

import os
import subprocess
import sys
import tempfile

import fastrms

ONE_STEP = """
import time
start = time.perf_counter()
import numpy, fastrms
param = numpy.ones(64, "float32")
fastrms.RMSProp(param, backend="numba").step(param + 1)
print(time.perf_counter() - start)
"""


def seconds():
    """(seconds without the cache, seconds with it); both include the import of fastrms and Numba."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        run = [sys.executable, "-c", ONE_STEP]
        return tuple(float(subprocess.check_output(run, env=environment, text=True)) for _ in range(2))


def sentence():
    """The sentence for the report; None without Numba."""
    if "numba" not in fastrms.available_backends():
        return None
    without, cached = seconds()
    return f"first step of fastrms numba, imports included: {without:.1f} s without its cache, {cached:.1f} s with it"
