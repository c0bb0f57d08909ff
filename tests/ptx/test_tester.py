"""The tester tested: it notices every single-instruction change of the PTX, refuses what it cannot execute exactly, and
agrees with gcc on programs that nvcc compiled."""

import contextlib
import ctypes
import random
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")

import cases
import execute
from conftest import DTYPES, bits

from fastrms.backends.cuda.kernel import Kind

SWAPS = {"mul.rn": "add.rn", "add.rn": "sub.rn", "sub.rn": "add.rn", "div.rn": "mul.rn", "setp.lt.u64": "setp.le.u64",
         "setp.ge.u64": "setp.gt.u64", "setp.lt.f": "setp.ge.f", "shl.b64": "shr.u64", "mad.lo.s64": "mul.lo.s64",
         "sqrt.rn": "abs", "abs.f": "neg.f"}  # fmt: skip


def mutants(text):
    """(what, PTX) for every change of one instruction: another operation, a dropped access or branch, a negated guard."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        word = line.strip()
        changed = [line.replace(old, new, 1) for old, new in SWAPS.items() if re.match(rf"{re.escape(old)}", word)]
        if word.startswith("mad.lo.s64"):
            changed = [
                re.sub(r", \d+, %rd\d+;", lambda m: m.group().rsplit(",", 1)[0] + ";", line).replace(
                    "mad.lo.s64", "mul.lo.s64"
                )
            ]
        if word.startswith(("st.global", "ld.global", "@%p")):
            changed.append("")
        if word.startswith("@%p"):
            changed.append(line.replace("@%p", "@!%p"))
        if word.startswith("selp"):
            target, x, y, p = word.rstrip(";").split(None, 1)[1].split(", ")
            changed.append(f"{word.split()[0]} {target}, {y}, {x}, {p};")
        for new in changed:
            yield f"{word} -> {new.strip() or 'nothing'}", "\n".join([*lines[:number], new, *lines[number + 1 :]])


def right(text, rule, dtype):
    """Whether a kernel passes what test_ptx.py asks, on both kinds of numbers."""
    kernel = execute.Kernel(text)
    for ordinary, offset, apart in ((True, 0, False), (False, 1, False), (True, 1, True)):  # the last has no vectors
        recipe = cases.recipe_of(rule, False, dtype, visible=ordinary)
        buffers = cases.buffers_of(rule, dtype, 1027, ordinary)
        tensor = cases.Tensor(buffers, offset, apart)
        try:
            cases.launch(kernel, Kind(), recipe, [tensor], backwards=ordinary)
            tensor.check(cases.expected(recipe, buffers), buffers[1])
        except (AssertionError, IndexError):
            return False
    return True


def compiles(text):
    """Whether a mutant can be executed."""
    with contextlib.suppress(execute.Refused):
        return execute.Kernel(text).library is not None
    return False


@pytest.mark.parametrize("rule, dtype, cc", [("rmsprop", DTYPES[0], (9, 0)), ("adam", DTYPES[1], (12, 0))])
def test_every_mutant_is_noticed(rule, dtype, cc, monkeypatch):
    monkeypatch.setattr(execute, "FLAGS", ["-O0", *execute.FLAGS[1:]])
    text = cases.text(rule, False, dtype, Kind(), cc)
    assert right(text, rule, dtype)
    tried = list(mutants(text))
    with ThreadPoolExecutor() as pool:  # gcc runs on all processors
        list(pool.map(compiles, (changed for _, changed in tried)))
    unnoticed = [what for what, changed in tried if right(changed, rule, dtype)]
    print(f"{len(tried)} mutants of {rule} {dtype}")
    assert len(tried) > 60 and not unnoticed, unnoticed


@pytest.mark.parametrize(
    "line", ["div.full.f32", "sqrt.approx.f32", "ex2.approx.f32", "mul.rn.ftz.f32", "atom.global.add.f32"]
)
def test_what_is_not_exact_or_not_known_is_refused(line):
    text = cases.text("rmsprop", False, DTYPES[0], Kind(), (9, 0))
    with pytest.raises(execute.Refused):
        execute.Kernel(re.sub(r"mul\.rn\.f32", line, text, count=1)).library  # noqa: B018


def expression(choose, depth, kind):
    """A random C expression of floats "f", ints "i" or unsigned 64-bit integers "U"."""
    if depth == 0:
        return choose.choice({"f": ["a", "b", "1.5f"], "i": ["x", "y", "7"], "U": ["(unsigned long long)x", "w"]}[kind])
    one, two = expression(choose, depth - 1, kind), expression(choose, depth - 1, kind)
    if kind == "f":
        forms = [f"({one}+{two})", f"({one}*{two})", f"({one}-{two})", f"({one}/{two})", f"sqrtf(fabsf({one}))",
                 f"({one}<{two}?{one}:{two})", f"(!({one}>={two})?{two}:{one})", f"(-{one})"]  # fmt: skip
    elif kind == "i":
        forms = [f"(int)((unsigned){one}+(unsigned){two})", f"(int)((unsigned){one}*(unsigned){two})", f"({one}&{two})",
                 f"({one}>>{choose.randint(0, 31)})", f"({one}<{two}?{one}:{two})", f"({one}^{two})"]  # fmt: skip
    else:
        forms = [f"({one}+{two})", f"({one}*{two})", f"({one}>>{choose.randint(0, 63)})", f"({one}<{two}?{two}:{one})"]
    return choose.choice(forms)


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
@pytest.mark.parametrize("seed", range(12))
def test_random_programs_of_nvcc_and_gcc(seed, tmp_path):
    choose, size = random.Random(seed), 1024
    lines = "".join(f"{out}[t] = {expression(choose, 3, kind)};" for out, kind in (("f", "f"), ("i", "i"), ("u", "U")))
    arguments = "const float *A, const float *B, const int *X, const int *Y, float *f, int *i, unsigned long long *u"
    body = f"float a = A[t], b = B[t]; int x = X[t], y = Y[t]; unsigned long long w = x * 77ull ^ y; {lines}"
    (tmp_path / "k.cu").write_text(
        f'extern "C" __global__ void k({arguments}) {{ int t = blockIdx.x * 128 + threadIdx.x; {body} }}'
    )
    (tmp_path / "k.c").write_text(
        f"#include <math.h>\nvoid k({arguments}) {{ for (int t = 0; t < {size}; t++) {{ {body} }} }}"
    )
    arch = ["sm_80", "sm_90", "sm_100", "sm_120"][seed % 4]
    subprocess.run(
        ["nvcc", "-ptx", "-fmad=false", f"-arch={arch}", "k.cu", "-o", "k.ptx"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    subprocess.run(["gcc", *execute.FLAGS, "k.c", "-o", "k.so", "-lm"], cwd=tmp_path, check=True)
    rng = np.random.default_rng(seed)
    reals = [cases.wild_values(size, DTYPES[0], seed + k) for k in range(2)]
    integers = [rng.integers(-(2**31), 2**31, size).astype(np.int32) for _ in range(2)]
    results = [[np.zeros(size, kind) for kind in (np.float32, np.int32, np.uint64)] for _ in range(2)]
    kernel = execute.Kernel((tmp_path / "k.ptx").read_text())
    kernel.launch(size // 128, 128, [execute.Buffer(x) for x in (*reals, *integers, *results[0])])
    ctypes.CDLL(str(tmp_path / "k.so")).k(*[ctypes.c_void_p(x.ctypes.data) for x in (*reals, *integers, *results[1])])
    assert np.array_equal(bits(results[0][0]), bits(results[1][0]))
    assert all(np.array_equal(a, b) for a, b in zip(results[0][1:], results[1][1:], strict=True))


def test_the_fused_example_has_the_bits_of_two_steps_apart():
    """Gradient and Adam in one user kernel, against NumPy."""
    import runpy
    from pathlib import Path

    compile_fused = runpy.run_path(str(Path(__file__).parents[2] / "examples/fused_cuda.py"))["compile_fused"]
    recipe = cases.recipe_of("adam", False, DTYPES[0], visible=True)
    weight, target, exp_avg, exp_avg_sq = cases.buffers_of("adam", DTYPES[0], 1003, ordinary=True)
    want = cases.expected(recipe, [weight, weight - target, exp_avg, exp_avg_sq])
    buffers = [execute.Buffer(x.copy()) for x in (weight, exp_avg, exp_avg_sq, target)]
    for cc in ((9, 0), (12, 0)):
        for buffer, values in zip(buffers, (weight, exp_avg, exp_avg_sq, target), strict=True):
            buffer.array[:] = values
        execute.Kernel(compile_fused(cc)).launch(4, 256, [*buffers, 1003, *cases.coefficients_of(recipe)])
        assert all(np.array_equal(bits(b.array), w) for b, w in zip(buffers[:3], want, strict=True))
