"""Executes PTX on the CPU: each instruction becomes a call of the C function of its name in machine.h."""

import ctypes
import functools
import hashlib
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
FLAGS = [
    "-O1",
    "-march=native",
    "-ffp-contract=off",
    "-fno-fast-math",
    "-fwrapv",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
]
SPECIAL = {"%tid.x": "tid", "%ctaid.x": "cta", "%ntid.x": "ntid", "%nctaid.x": "ncta"}
SIZES = {"64": 8, "32": 4, "16": 2, "8": 1}
ERRORS = {
    1: "misaligned access",
    2: "load out of range",
    3: "store out of range",
    4: "an exchange without all threads of a warp",
}
RUN = """
int run(const u64 *P, u32 ntid, u32 first, u32 last, u32 ncta, int backwards, memory *m)
{
    u64 count = (u64)(last - first) * ntid;
    for (u64 k = 0; k < count && !m->error; k++) {
        u64 t = backwards ? count - 1 - k : k;
        thread(m, P, (u32)(t % ntid), ntid, first + (u32)(t / ntid), ncta);
    }
    return m->error;
}
"""


RUN_WARPS = """
#include "warp.h"
int run(const u64 *P, u32 ntid, u32 first, u32 last, u32 ncta, int backwards, memory *m)
{
    u64 count = (u64)(last - first) * ntid / WARP;
    for (u64 k = 0; k < count && !m->error; k++) {
        u64 t = (backwards ? count - 1 - k : k) * WARP;
        run_warp(m, P, (u32)(t % ntid), ntid, first + (u32)(t / ntid), ncta, backwards);
    }
    return m->error;
}
"""


class Refused(Exception):
    """The PTX holds something whose result PTX does not define to the last bit, or that machine.h does not know."""


class Region(ctypes.Structure):
    _fields_ = [("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("stores", ctypes.c_void_p)]


class Memory(ctypes.Structure):
    _fields_ = [
        ("region", ctypes.c_void_p),
        ("regions", ctypes.c_int),
        ("error", ctypes.c_int),
        ("address", ctypes.c_uint64),
    ]


class Buffer:
    """Memory that a kernel may touch: an array, and how often each of its bytes was stored."""

    def __init__(self, array):
        self.array = array
        self.stores = np.zeros(array.nbytes, np.uint8)
        self.address = array.ctypes.data

    def region(self):
        return Region(self.address, self.address + self.array.nbytes, self.stores.ctypes.data)


class Kernel:
    """The kernel in a PTX text, as C."""

    def __init__(self, ptx):
        ptx = re.sub(r"//[^\n]*", "", ptx)
        if re.search(r"\.func\b|\.local\b|\.shared\b", ptx):
            raise Refused("a call that was not inlined, or memory other than global")
        found = re.search(r"\.visible\s+\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{(.*)\n\}", ptx, re.S)
        self.name, parameters, self.attributes, self.body = found.groups()
        self.parameters = re.findall(r"\.param\s+\.(\w+)(?:\s+\.ptr[^,\n]*?)?\s+([\w$]+)(?=\s*(?:,|$))", parameters)
        self.opcodes = [line.split()[0] for line in self.lines() if not line.endswith(":")]

    def lines(self):
        """Instructions, without predicates, and labels."""
        for line in re.split(r"[;\n]", re.sub(r"\.(reg|pragma|loc)[^;]*;", "", self.body)):
            line = re.sub(r"^@!?%\w+\s+", "", line.strip())
            if line.strip("{}"):
                yield line

    @property
    def exchanges(self):
        """Whether threads of a warp exchange registers."""
        return any(opcode.startswith("shfl") for opcode in self.opcodes)

    @functools.cached_property
    def library(self):
        return built(self.source())

    def source(self):
        """The kernel as a C function of one thread."""
        body, registers = [], []
        for kind, prefix, count in re.findall(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>;", self.body):
            word = {"f32": "u32", "f64": "u64"}.get(kind, kind)
            registers += [f"{word} {prefix[1:]}_{k} = 0;" for k in range(int(count))]
        for line in re.split(r"[;\n]", re.sub(r"\.(reg|pragma|loc)[^;]*;", "", self.body)):
            guard, line = re.fullmatch(r"(?:@(!?%\w+)\s+)?(.*)", line.strip(), re.S).groups()
            if line.strip("{}"):
                body.append((f"if ({self.operand(guard)}) " if guard else "") + self.statement(line))
        head = "static void thread(memory *m, const u64 *P, u32 tid, u32 ntid, u32 cta, u32 ncta)\n{\n"
        run = RUN_WARPS.replace("warp.h", f"{HERE}/warp.h") if self.exchanges else RUN
        return f'#include "{HERE}/machine.h"\n{head}' + "\n".join([*registers, *body]) + "\nend: ;\n}\n" + run

    def statement(self, line):
        if line.endswith(":"):
            return line.replace("$", "") + ";"
        opcode, _, rest = line.replace("\t", " ").partition(" ")
        operands = [x.strip() for x in re.split(r",(?![^{]*\})", rest)] if rest.strip() else []
        if opcode in ("ret", "exit"):
            return "goto end;"
        if opcode in ("membar.sys", "bar.warp.sync"):  # the threads run one after another
            return ";"
        if opcode in ("bra", "bra.uni"):
            return f"goto {operands[0].replace('$', '')};"
        if opcode.startswith(("ld.param.", "ld.global.", "st.global.")):
            return self.access(opcode, operands)
        if opcode == "mov.b64" and operands[0].startswith("{"):  # the halves of a register, of which "_" is not wanted
            halves, source = operands[0].strip("{}").split(","), self.operand(operands[1])
            wanted = [(half.strip(), shift) for half, shift in zip(halves, (0, 32), strict=True) if half.strip() != "_"]
            moves = " ".join(f"{self.operand(half)} = (u32)({source} >> {shift});" for half, shift in wanted)
            return f"{{ {moves} }}"
        target, *sources = map(self.operand, [operands[0].partition("|")[0], *operands[1:]])  # of a|p, p is not used
        return f"{target} = {opcode.replace('.', '_')}({', '.join(sources)});"

    def operand(self, text):
        if text in SPECIAL:
            return SPECIAL[text]
        register = re.fullmatch(r"(!?)%([a-z]+)(\d+)", text)
        if register:
            return "{}{}_{}".format(*register.groups())
        if re.fullmatch(r"0[fd][0-9A-Fa-f]+", text):
            return f"0x{text[2:]}ull"
        if re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+U?", text):
            return f"{text.rstrip('U')}ll"
        raise Refused(f"operand {text}")

    def access(self, opcode, operands):
        """Loads and stores, of one number or a vector; a hint for the caches changes nothing."""
        space, *vector, kind = re.sub(r"\.(cs|L1::\w+)\b", "", opcode).split(".")[1:]
        target, where = operands if opcode.startswith("ld") else reversed(operands)
        base, offset = re.fullmatch(r"\[(%?[\w$]+)(?:\+(-?\d+))?\]", where).groups()
        if space == "param":
            if offset or kind[1:] not in SIZES:
                raise Refused(f"{opcode} {where}")
            return f"{self.operand(target)} = ({kind})P[{[name for _, name in self.parameters].index(base)}];"
        size, registers = SIZES[kind[1:]], [self.operand(x.strip()) for x in target.strip("{}").split(",")]
        if vector not in ([], [f"v{len(registers)}"]):
            raise Refused(opcode)
        error = "BAD_LOAD" if opcode.startswith("ld") else "BAD_STORE"
        reach = f"if (!reach(m, at, {size * len(registers)}, {error})) goto end;"
        check = f"{{ u64 at = {self.operand(base)} + ({offset or 0}); {reach} "
        if opcode.startswith("ld"):
            moves = [f"LOAD({register}, {kind}, at + {k * size})" for k, register in enumerate(registers)]
        else:
            moves = [f"STORE({kind}, at + {k * size}, {register})" for k, register in enumerate(registers)]
        return check + " ".join(moves) + " }"

    def launch(self, grid, block, arguments, regions=(), blocks=None, backwards=False):
        """Run the threads of a grid one after another.  arguments: Buffers, integers, NumPy numbers."""
        buffers = [x for x in (*arguments, *regions) if isinstance(x, Buffer)]
        table = (Region * max(1, len(buffers)))(*[buffer.region() for buffer in buffers])
        slots = [word(x) for x in arguments]
        if len(slots) != len(self.parameters):
            raise TypeError(f"{self.name} takes {len(self.parameters)} arguments, got {len(slots)}")
        self.launch_words(grid, block, slots, table, len(buffers), blocks, backwards)

    def launch_words(self, grid, block, slots, table, count, blocks=None, backwards=False):
        memory = Memory(ctypes.addressof(table), count, 0, 0)
        first, last = blocks or (0, grid)
        words = (ctypes.c_uint64 * len(slots))(*slots)
        error = self.library.run(words, block, first, last, grid, backwards, ctypes.byref(memory))
        if error:
            raise IndexError(f"{ERRORS[error]} at {memory.address:#x}")


def word(x):
    """An argument as a kernel parameter's 64 bits."""
    if isinstance(x, Buffer):
        return x.address
    if isinstance(x, np.floating):
        return int(x.view(f"u{x.itemsize}"))
    return int(x)


@functools.cache
def folder():
    return tempfile.TemporaryDirectory(prefix="fastrms-ptx-")


@functools.cache
def built(source):
    """A C text as a loaded library."""
    path = Path(folder().name, hashlib.sha256(source.encode()).hexdigest()[:16])
    path.with_suffix(".c").write_text(source)
    command = ["gcc", *FLAGS, "-Werror=implicit-function-declaration", path.with_suffix(".c"), "-o", path, "-lm"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refused(done.stderr[:2000])
    return ctypes.CDLL(str(path))
