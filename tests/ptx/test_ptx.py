"""The compiled PTX, executed on the CPU, has the bits of NumPy and C.  No GPU test: see docs/promises.md."""

import inspect
import mmap
import re

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
pytest.importorskip("cuda.core", reason="needs the extra cuda-test")

import cases
import execute
from conftest import DTYPES

from fastrms.backends import norm, trace
from fastrms.backends.cuda import launch, lower, table
from fastrms.backends.cuda.kernel import Kind

LONGEST = max(cases.LENGTHS)
RESERVED = 0x4000  # MAP_NORESERVE


def test_every_operation_of_a_rule_is_known_to_cuda():
    assert lower.EMIT.keys() == trace.EXPRESSIONS.keys()


def cache_paths():
    """Those of a kernel of a rule, of one for formats, and of one that sums gradients in bf16."""
    kinds = Kind(), Kind(formats=table.Formats(("float32", "bf16", "q8u"), "bf16", (), True))
    found = [cases.compiler.cache_path("adam", False, DTYPES[0], kind, (9, 0)) for kind in kinds]
    return [*found, cases.compiler.norm_path("lane_sums_bf16", (9, 0))]


@pytest.mark.parametrize("name", ["lower", "intrinsics", "compile", "codecs", "stored_kernel", "fastrms.formats"])
def test_what_compiles_a_kernel_is_in_its_key(name, monkeypatch):
    """With another text of any of these files, no kept kernel is found."""
    before, source = cache_paths(), inspect.getsource
    assert before == cache_paths()

    def edited(module):
        return source(module) + " " * module.__name__.endswith(name)

    monkeypatch.setattr(cases.compiler, "versions", cases.compiler.versions.__wrapped__)
    assert cache_paths() == before
    monkeypatch.setattr(cases.compiler.inspect, "getsource", edited)
    assert not {*cache_paths()} & {*before}


@pytest.mark.parametrize("of_formats", [False, True])
def test_a_kernel_calls_nothing_that_is_not_in_its_key(of_formats):
    """Whatever its text calls is numba, or stands in a file of the key."""
    kind = Kind(formats=table.Formats(("split16", "bf16", "q8u"), "fp16", ("bf16",), True)) if of_formats else Kind()
    found = cases.compiler.names_of("adam", False, DTYPES[0], kind)
    files = {inspect.getfile(module) for module in cases.compiler.sources()}
    for name, made in found.items():
        code = getattr(getattr(made, "defn", getattr(made, "py_func", made)), "__code__", None)
        assert code is None or code.co_filename in {*files, "<string>"}, name


@pytest.mark.parametrize("rule, general, dtype, dialect", cases.every(*cases.DIALECTS))
def test_every_kernel_has_the_bits_of_numpy_and_c(rule, general, dtype, dialect):
    kernels = cases.kernels(rule, general, dtype, Kind(), dialect)
    for ordinary in (False, True):
        recipe = cases.recipe_of(rule, general, dtype, visible=ordinary)
        buffers = cases.buffers_of(rule, dtype, LONGEST, ordinary)
        want = cases.expected(recipe, buffers)
        for count, size in enumerate(cases.LENGTHS):
            for kernel in kernels:
                tensor = cases.Tensor([b[:size] for b in buffers], offset=count % 5 % 4, apart=count % 7 == 3)
                cases.launch(kernel, Kind(), recipe, [tensor], backwards=count % 2)
                tensor.check(want, buffers[1])


@pytest.mark.parametrize("rule, dtype, kind, cc", cases.OTHER_KINDS)
def test_many_tensors_and_capturable_kernels(rule, dtype, kind, cc):
    kernel = cases.kernel(rule, True, dtype, kind, cc)
    recipe = cases.recipe_of(rule, True, dtype, visible=False)
    buffers = cases.buffers_of(rule, dtype, LONGEST, ordinary=False)
    want = cases.expected(recipe, buffers)
    sizes = (1, 0, 3, 17, 1024, 4099, 5, 2048) if kind.many else (4099,)
    tensors = [cases.Tensor([b[:size] for b in buffers], k % 3, apart=k == 5) for k, size in enumerate(sizes)]
    cases.launch(kernel, kind, recipe, tensors)
    for tensor in tensors:
        tensor.check(want, buffers[1], kind.zero_grad)
    if kind.capturable:
        tensors = [cases.Tensor([b[:size] for b in buffers], k % 3, apart=k == 5) for k, size in enumerate(sizes)]
        cases.launch(kernel, kind, recipe, tensors, made=0)
        assert not any(buffer.stores.any() for tensor in tensors for buffer in tensor.buffers)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_steps_in_a_row(dtype):
    kernel = cases.kernel("adam", False, dtype, Kind(), (9, 0))
    recipe = cases.recipe_of("adam", False, dtype, visible=True)
    buffers = cases.buffers_of("adam", dtype, 100_003, ordinary=True)
    tensor = cases.Tensor(buffers)
    for _ in range(5):
        want = cases.expected(recipe, [guarded.array for guarded in tensor.guarded])
        tensor = cases.Tensor([guarded.array for guarded in tensor.guarded])
        cases.launch(kernel, Kind(), recipe, [tensor])
        tensor.check(want, buffers[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("many", [False, True])
def test_every_length_at_every_offset(dtype, many):
    """The elements before the first vector, the vectors and the elements behind the last one meet without a gap."""
    kernel, recipe = cases.kernel("adam", False, dtype, Kind(many), (9, 0)), cases.recipe_of("adam", False, dtype, True)
    buffers = cases.buffers_of("adam", dtype, 20, ordinary=True)
    want = cases.expected(recipe, buffers)
    for apart in (False, True):
        for offset in range(4):
            tensors = [cases.Tensor([b[:size] for b in buffers], offset, apart) for size in range(1, 20)]
            for each in [tensors] if many else [[tensor] for tensor in tensors]:
                cases.launch(kernel, Kind(many), recipe, each)
            for tensor in tensors:
                tensor.check(want, buffers[1])
                count = table.vectors(tensor.addresses, tensor.size, dtype.itemsize)
                head = -offset % table.width(dtype)
                assert count == (0 if apart else max(0, tensor.size - head) // table.width(dtype))


def elements_of(threads, vectors, size, head):
    """Which elements the threads of a grid update."""
    lanes = (threads[threads < vectors][:, None] * 4 + np.arange(4)).reshape(-1) + head
    singles = threads[threads >= vectors] - vectors
    singles = np.where(singles < head, singles, singles + 4 * vectors)
    return np.concatenate([lanes, singles[singles < size]])


@pytest.mark.parametrize("offset", [0, 1, "apart"])
@pytest.mark.parametrize("cc", cases.ARCHITECTURES)
def test_the_last_blocks_above_two_to_the_31_elements(cc, offset):
    """Only their threads run; the memory in front of them is reserved and never touched."""
    dtype, size = DTYPES[0], (1 << 31) + 4099
    kernel, recipe = cases.kernel("rmsprop", False, dtype, Kind(), cc), cases.recipe_of("rmsprop", False, dtype, True)
    memory = [mmap.mmap(-1, 4 * size + 8, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | RESERVED) for _ in range(3)]
    offsets = [0, 1, 2] if offset == "apart" else [offset] * 3
    flats = [np.frombuffer(m, dtype)[o:][:size] for m, o in zip(memory, offsets, strict=True)]
    vectors = table.vectors([flat.ctypes.data for flat in flats], size, 4)
    grid = table.blocks(size, vectors, 4)
    threads = np.arange((grid - 2) * table.THREADS, grid * table.THREADS)
    touched = elements_of(threads, vectors, size, head=3 if offset == 1 else 0)
    start = touched[touched > 3].min()  # the elements before the first vector are updated by the last threads, too
    for flat, values in zip(flats, cases.buffers_of("rmsprop", dtype, touched.size, True), strict=True):
        flat[touched] = values
    want = cases.expected(recipe, [flat[touched] for flat in flats])
    ends = [(f.ctypes.data + 4 * a, f.ctypes.data + 4 * b) for f in flats for a, b in ((0, 4), (start, size))]
    regions = (execute.Region * 6)(*[execute.Region(*pair) for pair in ends])
    words = [*(flat.ctypes.data for flat in flats), size, vectors, *map(execute.word, cases.coefficients_of(recipe))]
    kernel.launch_words(grid, table.THREADS, words, regions, 6, blocks=(grid - 2, grid))
    assert touched.max() == size - 1 and (vectors == 0) == (offset == "apart")
    for flat, result in zip((flats[0], flats[2]), want, strict=True):
        assert np.array_equal(cases.bits(flat[touched]), result)


@pytest.mark.parametrize("cc", cases.ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 4095, 4096, 4097, 8200])
def test_the_squares_of_a_gradient_are_summed_in_the_order_of_the_host(size, cc):
    """Every lane of every block, then the blocks of two segments, inside their buffers."""
    grad, (blocks, lanes) = cases.wild_values(size, DTYPES[0], 3), (-(-size // norm.BLOCK), norm.LANES)
    there, sums, total = execute.Buffer(grad), execute.Buffer(np.full(blocks * lanes, np.nan)), execute.Buffer(np.zeros(2))
    rows = execute.Buffer(np.array([0, 0, 0, there.address, size, 0], np.uint64))
    tensor_of = execute.Buffer(np.ones(blocks, np.uint32))
    kernels = {name: cases.norm_kernel(name, cc) for name in ("lane_sums_float", "segment_sums")}
    kernels["lane_sums_float"].launch(-(-blocks * lanes // 256), 256, [rows, tensor_of, sums, blocks], [there])
    with np.errstate(all="ignore"):
        padded = np.zeros(blocks * norm.BLOCK)
        padded[:size] = grad.astype(np.float64) ** 2
        by_lane = np.add.accumulate(padded.reshape(blocks, -1, lanes), axis=1)[:, -1].reshape(-1)
        wanted = [norm.segment_scan(part).sum for part in (grad[: norm.BLOCK], grad[norm.BLOCK :])]
    assert np.array_equal(cases.bits(sums.array), cases.bits(by_lane)) and (sums.stores == 1).all()
    first_of = execute.Buffer(np.array([0, 1, blocks], np.uint32))
    kernels["segment_sums"].launch(1, 256, [sums, first_of, total, 2])
    assert np.array_equal(cases.bits(total.array), cases.bits(np.array(wanted))) and (total.stores == 1).all()
    assert not re.search(
        r"\bfma|approx|full|ftz", " ".join(kernels["lane_sums_float"].opcodes + kernels["segment_sums"].opcodes)
    )


@pytest.mark.parametrize("cc", cases.ARCHITECTURES)
@pytest.mark.parametrize("size", [1, 7, 4095, 4097, 8200])
def test_the_squares_of_doubles_are_summed_in_the_order_of_the_host(size, cc):
    """Each block has an exponent of its own; only that of the sum is not the one of the host."""
    grad, blocks, parts = cases.buffers_of("rmsprop", DTYPES[1], size, True)[1], -(-size // norm.BLOCK), 2
    grad = np.ldexp(grad, np.resize([0, 900, -900], size))
    grad[norm.BLOCK :] *= 2.0**-1000
    there, sums = execute.Buffer(grad), execute.Buffer(np.full(blocks * (norm.LANES + 1), np.nan))
    rows = execute.Buffer(np.array([0, 0, 0, there.address, size, 0], np.uint64))
    tensor_of, first_of = (execute.Buffer(np.array(x, np.uint32)) for x in ([1] * blocks, [0, 1, blocks]))
    total = execute.Buffer(np.full(2 * parts, np.nan))
    kernels = [cases.norm_kernel(f"{name}_sums_double", cc) for name in ("lane", "segment")]
    kernels[0].launch(-(-blocks * norm.LANES // 256), 256, [rows, tensor_of, sums, blocks], [there])
    kernels[1].launch(1, 256, [sums, first_of, total, parts])
    for (found, exponent), part in zip(total.array.reshape(-1, 2), (grad[: norm.BLOCK], grad[norm.BLOCK :]), strict=True):
        wanted = norm.segment_scan(part)
        assert found == np.ldexp(wanted.sum, 2 * (wanted.exponent - int(exponent)))
    assert (sums.stores == 1).all() and (total.stores == 1).all()
    assert not re.search(r"\bfma|approx|full|ftz|f32", " ".join(kernels[0].opcodes + kernels[1].opcodes))


@pytest.mark.parametrize("found", [0, 3, 3 * 2**33])
@pytest.mark.parametrize("cc", cases.ARCHITECTURES)
def test_what_is_decided_about_a_step(cc, found):
    """The step counts, and its row is copied from those ahead, where the counts are 0; else the row is 0, whatever stood
    there.  What the host sees is one word of two halves, and before it the count of each step."""
    counts, most = np.zeros(70, np.uint64), launch.AHEAD
    counts[[1, 40, 69]] = [found // 3, found // 3, found // 3]
    state, seen = execute.Buffer(np.array([2**32 + 4, 1029, 9], np.uint64)), execute.Buffer(np.full(1 + most, 77, np.uint64))
    ahead = [execute.Buffer(np.arange(most * 3, dtype=np.float32)), execute.Buffer(np.array([0.5, 1.5]))]
    rows = [execute.Buffer(np.array([5, 6, 1], np.float32)), execute.Buffer(np.full(2, np.nan))]
    targets = [[rows[0].address, ahead[0].address, 3, most - 1], [rows[1].address, ahead[1].address, 4, 0]]
    kernel = cases.norm_kernel("decide", cc)
    arguments = [
        execute.Buffer(counts),
        counts.size,
        state,
        seen,
        execute.Buffer(np.array(targets, np.uint64).reshape(-1)),
        2,
    ]
    kernel.launch(1, 256, arguments, [*ahead, *rows])
    made = 1029 + (found == 0)
    assert state.array.tolist() == [2**32 + 5, made, found]
    assert seen.array[0] == (5 << 32) + made and seen.array[1 + 5] == found and (seen.array == 77).sum() == most - 1
    first = 3 * (1030 - most)
    assert [row.array.tolist() for row in rows] == (
        [[0, 0, 0], [0, 0]] if found else [[first, first + 1, first + 2], [0.5, 1.5]]
    )
    *_, fence, word = [opcode for opcode in kernel.opcodes if re.match("membar|fence|st.global", opcode)]
    assert fence == "membar.sys" and word in ("st.global.u64", "st.global.b64")
    kernel.launch(1, 256, arguments, [*ahead, *rows])
    assert state.array.tolist() == [2**32 + 6, 1029 + 2 * (found == 0), found]


@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize(
    "of, dtype", [("float", np.float32), ("double", np.float64), ("bf16", np.uint16), ("fp16", np.float16)]
)
def test_gradients_of_a_skipped_step_are_zeroed(of, dtype, skips):
    """Every element once, or none."""
    size, cc = 2 * norm.BLOCK + 1003, cases.ARCHITECTURES[len(of) % 4]
    grad = execute.Buffer(np.arange(size).astype(dtype))
    rows = execute.Buffer(np.array([grad.address, size, 0], np.uint64))
    state, kernel = (
        execute.Buffer(np.array([1, 1, 5 * skips], np.uint64)),
        cases.norm_kernel(f"lane_zeros_{of}", cc),
    )
    kernel.launch(1, 256, [rows, execute.Buffer(np.zeros(3, np.uint32)), state, 3], [grad])
    assert (grad.stores == skips).all() and grad.array.any() == (not skips)


@pytest.mark.parametrize("rule, general, dtype, dialect", cases.every(*cases.DIALECTS))
def test_what_the_text_of_a_kernel_holds(rule, general, dtype, dialect):
    for kernel in cases.kernels(rule, general, dtype, Kind(), dialect):
        check_text(kernel, rule, dtype)


def check_text(kernel, rule, dtype):
    operations = " ".join(kernel.opcodes)
    assert not re.search(r"\bfma|approx|full|ftz|\bcall|\.local|cvt\.\w*\.?f|\bdiv\.[su]|\brem", operations)
    assert ("f64" in operations) == (dtype.itemsize == 8)
    assert not re.search(r"\b(add|sub|mul)\.f", operations)  # without .rn the assembler may contract them
    lanes, updated = table.width(dtype), len(cases.buffers_of(rule, dtype, 1, True)) - 1
    assert len(re.findall(rf"ld\.global\.v{lanes}\.\w+", operations)) == updated + 1
    assert len(re.findall(rf"st\.global\.v{lanes}\.\w+", operations)) == updated
    assert len(re.findall(r"ld\.global\.\w(?:32|64)", operations)) == updated + 1
    assert operations.count("bra") <= 5  # vector, tail, end: no branch in the rule
    words = ["u64"] * (updated + 3) + [f"f{dtype.itemsize * 8}"] * (len(kernel.parameters) - updated - 3)
    assert [kind for kind, _ in kernel.parameters] == words
    assert "256" in kernel.attributes
