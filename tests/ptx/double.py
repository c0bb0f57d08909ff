"""The driver double at work: builds driver.c, stands it in for libcuda.so.1 in this process, runs each launch's PTX."""

import contextlib
import ctypes
import gc
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import execute

HERE = Path(__file__).parent
HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
WRITE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
FINISH = ctypes.CFUNCTYPE(None)


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
    """launches: (name, grid, block, stream) each.  regions: arrays that stand for device memory; None allows all.  queue:
    what is to run when the host waits, None where it runs at once; graph: what is captured, None where nothing is."""

    def __init__(self, library):
        self.library, self.launches, self.errors, self.kernels = library, [], [], {}
        self.queue = self.graph = None
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
        self.do(partial(kernel.launch_words, grid, block, words, table, max(1, len(buffers))))
        return 0

    def do(self, job):
        """Run a job, or note it for later."""
        for jobs in (self.graph, self.queue):
            if jobs is not None:
                return jobs.append(job)
        job()

    @contextlib.contextmanager
    def later(self):
        """A `with` block in which a launch and a write to the device run when the host waits, as on a GPU that is behind;
        the memory that is written from is read then, too."""
        callbacks = WRITE(lambda *where: self.do(partial(ctypes.memmove, *where))), FINISH(self.finish)
        gc.collect()
        gc.disable()  # what other tests have left waits for the device when it is freed
        self.queue = []
        self.library.double_busy(1)  # no event has come
        self.library.double_later(*callbacks)
        try:
            yield self
            self.finish()
        finally:
            self.library.double_later(None, None)
            self.library.double_busy(0)
            self.queue = None
            gc.enable()

    def finish(self):
        """Run what is in the queue."""
        jobs, self.queue = self.queue, None
        try:
            for job in jobs or ():
                job()
        except Exception as error:  # must not cross into C
            self.errors.append(repr(error))
        self.queue = None if jobs is None else []

    def capture(self, step):
        """The graph of a step: the jobs that replay() does."""
        self.library.double_capturing(1)
        self.graph = []
        try:
            step()
            return self.graph
        finally:
            self.graph = None
            self.library.double_capturing(0)

    def replay(self, graph):
        """Launch a graph."""
        for job in graph:
            self.do(job)

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
