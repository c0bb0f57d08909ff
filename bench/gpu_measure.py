"""What `python -m bench.gpu` measures with: the GPU, random arrays on it, and time by its own events."""

import math
import statistics
import subprocess
import time
from importlib import metadata

import numpy as np

import fastrms
from fastrms import storage
from fastrms.backends.cuda.driver import stream_of
from fastrms.memory import device

DOUBLE = "driver double"  # the name of a GPU whose times are no times
PACKAGES = ("numpy", "numba", "numba-cuda", "cuda-core", "cuda-bindings", "nvidia-nvjitlink", "torch", "cupy-cuda13x",
            "cupy-cuda12x", "fastrms")  # fmt: skip
SMI = "name,driver_version,clocks.sm,clocks.mem,clocks.max.mem,power.draw,temperature.gpu"
PATTERN = 1 << 20  # random numbers that are made on the host; larger arrays repeat them
ROUNDS = 7
BEHIND = 2e-3  # seconds by which the GPU is behind Python, beyond what Python needs
MOST_STEPS = 200  # launches between two events; a stream takes about 1000 before Python has to wait


def packages():
    """Name -> version of what is installed of PACKAGES."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def smi():
    """What nvidia-smi says now of clocks, power and temperature: a text, empty where it is not there."""
    try:
        run = subprocess.run(["nvidia-smi", f"--query-gpu={SMI}", "--format=csv,noheader"], capture_output=True, text=True)
    except OSError:
        return ""
    return run.stdout.strip()


def pattern(size, seed):
    """Normal numbers, as many as are made on the host for an array of this size."""
    return np.random.default_rng(seed).standard_normal(min(size, PATTERN))


def host_seconds(step, wait, count):
    """What `count` calls take until the last is done; one call before does not count."""
    step()
    wait()
    start = time.perf_counter()
    for _ in range(count):
        step()
    wait()
    return time.perf_counter() - start


class Gpu:
    """A device, and its default stream, on which CuPy and torch work, too."""

    def __init__(self, index=0):
        self.index, self.device, self.stream = index, device.current(index), stream_of(device.LEGACY_STREAM)
        self.cc = tuple(self.device.compute_capability)
        self.is_double = self.device.name == DOUBLE
        self._scratch = device.allocate(1 << (8 if self.is_double else 28), np.dtype(np.float32), index)
        self._seconds = self._busy_seconds()

    def describe(self):
        driver = device.call_driver("asking for its version", "cuDriverGetVersion")[0]
        free, total = device.call_driver("asking for its memory", "cuMemGetInfo")
        return {"name": self.device.name, "compute capability": self.cc, "CUDA of the driver": driver, "bytes": total,
                "free bytes": free, "packages": packages(), "nvidia-smi": smi()}  # fmt: skip

    def random(self, size, dtype=np.float32, seed=0, offset=0):
        """An array of normal numbers, `offset` elements behind a multiple of 16 bytes."""
        return self._repeated(pattern(size, seed).astype(dtype), size, offset)

    def bf16(self, size, seed=0):
        """Normal numbers in bf16."""
        return fastrms.Stored(self._repeated(storage.stored(storage.BF16, pattern(size, seed).astype("f4")), size), "bf16")

    def _repeated(self, numbers, size, offset=0):
        """An array on the device of this size, which holds numbers of the host again and again."""
        array = device.allocate(size, numbers.dtype, self.index, offset * numbers.itemsize)
        there = numbers.size
        device.copy(self.part(array, 0, there), numbers)
        while there < size:
            more = min(there, size - there)
            device.copy(self.part(array, there, more), self.part(array, 0, more))
            there += more
        return array

    @staticmethod
    def part(array, start, size):
        address = array.address + start * array.dtype.itemsize
        return device.DeviceArray(array.owner, address, (size,), (1 if size > 1 else 0,), array.dtype, array.device)

    def synchronize(self):
        device.call_driver("waiting", "cuCtxSynchronize")

    def milliseconds(self, steps, rounds=ROUNDS, most=MOST_STEPS, least=5e-3):
        """Median milliseconds of one call of each of `steps`, name -> function, in interleaved rounds.

        Many calls stand between two events, behind work that keeps the GPU busy while Python makes the calls.
        """
        counts = {name: self._count(step, most, least) for name, step in steps.items()}
        found = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                count, python = counts[name]
                self._busy(python + BEHIND)
                found[name].append(self._timed(step, count) / count)
        return {name: statistics.median(times) for name, times in found.items()}

    def host_milliseconds(self, steps, rounds=ROUNDS, least=5e-2):
        """Median milliseconds of one call of each of `steps`, name -> (function, function that waits for it), in interleaved
        rounds of as many calls as take `least` seconds, by the clock of the host."""
        counts = {name: max(5, math.ceil(least / (host_seconds(*step, 5) / 5))) for name, step in steps.items()}
        found = {name: [] for name in steps}
        for _ in range(rounds):
            for name, step in steps.items():
                found[name].append(1e3 * host_seconds(*step, counts[name]) / counts[name])
        return {name: statistics.median(times) for name, times in found.items()}

    def _timed(self, step, count):
        from cuda.core import EventOptions

        options = EventOptions(timing_enabled=True)
        start = self.stream.record(options=options)
        for _ in range(count):
            step()
        end = self.stream.record(options=options)
        self.synchronize()
        return end - start

    def _count(self, step, most, least):
        """(how many calls take `least` seconds on the GPU, the seconds that Python takes to make them)."""
        step()
        once = self._timed(step, 3) / 3e3
        count = min(most, max(5, math.ceil(least / once)))
        start = time.perf_counter()
        for _ in range(5):
            step()
        python = (time.perf_counter() - start) / 5
        self.synchronize()
        return count, python * count

    def _write_scratch(self):
        scratch = self._scratch
        device.call_driver("work", "cuMemsetD8Async", scratch.address, 1, scratch.nbytes, device.LEGACY_STREAM)

    def _busy_seconds(self):
        self._write_scratch()
        return self._timed(self._write_scratch, 5) / 5e3

    def _busy(self, seconds):
        """Give the GPU work for some time."""
        for _ in range(min(500, math.ceil(seconds / self._seconds))):
            self._write_scratch()

    def python_microseconds(self, step, calls=100, rounds=15):
        """The least time of a call in Python, while the GPU is not waited for."""
        step()
        best = math.inf
        for _ in range(rounds):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                step()
            best = min(best, (time.perf_counter() - start) / calls)
        self.synchronize()
        return 1e6 * best
