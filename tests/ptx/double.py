"""The driver double at work: builds driver.c, stands it in for libcuda.so.1 in this process, runs each launch's PTX."""

import ctypes
import gc
import subprocess
import tempfile
from pathlib import Path

import execute

HERE = Path(__file__).parent
HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)


def start():
    """The double, loaded before anything looks for a driver."""
    folder = tempfile.mkdtemp(prefix="fastrms-driver-")
    path = f"{folder}/libcuda.so.1"
    options = ["-O1", "-w", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    subprocess.run(["gcc", *options, HERE / "driver.c", "-o", path, "-ldl"], check=True)
    return Double(ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL))


class Compiled(dict):
    """Name of a kernel -> its PTX."""

    def __missing__(self, name):
        raise LookupError(f"{name} was never compiled")


class Double:
    """launches: (name, grid, block, stream) each.  regions: arrays that stand for device memory; None allows all."""

    def __init__(self, library):
        self.library, self.launches, self.errors, self.kernels = library, [], [], {}
        self.regions, self.run, self.fail, self.compiled = [], True, 0, Compiled()
        self.hook = HOOK(self.on_launch)
        library.double_hook(self.hook)

    def on_launch(self, name, grid, block, stream, parameters):
        self.launches.append((name.decode(), grid, block, stream or 0))
        try:
            return self.execute(name.decode(), grid, block, parameters) if self.run and not self.fail else self.fail
        except Exception as error:  # must not cross into C
            self.errors.append(repr(error))
            return 700

    def execute(self, name, grid, block, parameters):
        if name not in self.kernels:
            self.kernels[name] = execute.Kernel(self.ptx(name))
        kernel = self.kernels[name]
        sizes = [execute.SIZES[kind[1:]] for kind, _ in kernel.parameters]
        words = [int.from_bytes(ctypes.string_at(parameters[k], size), "little") for k, size in enumerate(sizes)]
        buffers = [execute.Buffer(array) for array in self.regions]
        table = (execute.Region * max(1, len(buffers)))(*[buffer.region() for buffer in buffers])
        if not buffers:
            table[0].end = 2**64 - 1
        kernel.launch_words(grid, block, words, table, max(1, len(buffers)))
        return 0

    def ptx(self, name):
        """Of the kernel of that name that was compiled last."""
        return self.compiled[name]

    def learn(self, made):
        """Note the PTX of a fastrms.backends.cuda.compile.Compiled, which is returned."""
        if self.compiled.get(made.name, made.ptx) != made.ptx:
            self.kernels.pop(made.name, None)
        self.compiled[made.name] = made.ptx
        return made

    def learn_from(self, compiler):
        """Note the PTX of whatever the module `compiler` of the backend compiles from now on."""
        compiled, compiled_norm, link = compiler.compiled, compiler.compiled_norm, compiler.link
        compiler.compiled_norm = lambda *arguments: self.learn(compiled_norm(*arguments))
        compiler.compiled = lambda *arguments: self.learn(compiled(*arguments))
        compiler.link = lambda ptx, cc: self.learn(compiler.Compiled(execute.Kernel(ptx).name, ptx, link(ptx, cc))).cubin

    def counts(self):
        text = ctypes.create_string_buffer(1 << 14)
        self.library.double_counts(text, len(text))
        return {name: int(calls) for name, calls in (line.split() for line in text.value.decode().splitlines())}

    def waits(self):
        """(stream that waits, stream that it waits for) of each wait since the last call."""
        pairs = (ctypes.c_uint64 * 128)()
        many = self.library.double_waits(pairs)
        return [tuple(pairs[2 * k : 2 * k + 2]) for k in range(many)]

    def census(self, step):
        """The driver calls of a step; what other tests have left is not freed meanwhile."""
        self.library.double_reset()
        self.launches.clear()
        gc.disable()
        try:
            step()
            return self.counts()
        finally:
            gc.enable()
