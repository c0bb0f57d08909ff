"""The kernels for storage formats, executed on the CPU, have the bits of NumPy.  No GPU test: see docs/promises.md."""

import re

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="needs the extra cuda-test")
pytest.importorskip("cuda.core", reason="needs the extra cuda-test")

import cases
import execute
import stored_cases
from stored_cases import F32, FORMATS, Stored

from fastrms import formats, rules
from fastrms.backends.cuda import table

LENGTHS = [1, 2, 3, 5, 7, 31, 33, 255, 256, 257, 1003, 2048, 4099]
NEW_DIALECT = (10, 0)  # of PTX


def test_every_format_has_every_place_it_may_have():
    found = {"gradients": {made.grad for _, made in stored_cases.ALL},
             "parameters": {made.written[0] for _, made in stored_cases.ALL},
             "copies": {name for _, made in stored_cases.ALL for name in made.copies}}  # fmt: skip
    assert found == {place: set(names) for place, names in stored_cases.PLACES.items()}
    assert {rule for rule, _ in stored_cases.ALL} == set(rules.RULES)
    states = {name for _, made in stored_cases.ALL for name in made.written[1:]}
    assert states == {name for name, made in FORMATS.items() if "states" in made.kinds}


@pytest.mark.parametrize("rule, made", stored_cases.ALL, ids=stored_cases.named)
def test_every_format_has_the_bits_of_numpy(rule, made):
    """At every offset, with and without vectors, for numbers of all magnitudes and ordinary ones; every byte once."""
    number = stored_cases.ALL.index((rule, made))
    kind = stored_cases.kind_of(made)
    kernel = cases.kernel(rule, bool(number % 2), F32, kind, cases.ARCHITECTURES[number % 4])
    recipe = cases.recipe_of(rule, bool(number % 2), F32, visible=True)
    for count, size in enumerate(LENGTHS):
        apart = (1,) if count % 5 == 4 else ()
        tensor = Stored(made, stored_cases.start(rule, size, count % 3), count % 4, apart)
        wanted = tensor.expected(recipe)
        stored_cases.run(kernel, kind, recipe, [tensor], backwards=count % 2)
        tensor.check(wanted)
        addresses = [part.stored.ctypes.data for part in tensor.parts]
        if not made.in_blocks:
            vectors, _ = table.grid([buffer.address for buffer in tensor.buffers], size, 4, made)
            assert vectors == (0 if apart else max(0, size - -count % 4) // 4), (size, addresses)


@pytest.mark.parametrize("k", [0, 1])
@pytest.mark.parametrize("cc", [(9, 0), NEW_DIALECT])
def test_many_tensors_capturable_and_zeroed_gradients(k, cc):
    made = next(made for rule, made in stored_cases.ALL if rule == "adam" and made.stochastic and made.in_blocks == k)
    kind = stored_cases.kind_of(made, many=True, capturable=True, zero_grad=True)
    kernel = cases.kernel("adam", True, F32, kind, cc)
    recipe = cases.recipe_of("adam", True, F32, visible=True)
    tensors = [
        Stored(made, stored_cases.start("adam", size), j % 4) for j, size in enumerate((1, 3, 17, 1024, 4099, 5, 2048))
    ]
    wanted = [tensor.expected(recipe) for tensor in tensors]
    stored_cases.run(kernel, kind, recipe, tensors)
    for tensor, want in zip(tensors, wanted, strict=True):
        tensor.check(want, zero_grad=True)
    stores = [buffer.stores.copy() for tensor in tensors for buffer in tensor.buffers]
    stored_cases.run(kernel, kind, recipe, tensors, made=0)
    after = [buffer.stores for tensor in tensors for buffer in tensor.buffers]
    assert all(np.array_equal(a, b) for a, b in zip(stores, after, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_special_numbers(name):
    """A rule that leaves a number as it is: NaN, infinite, subnormal, largest and halfway between two that are stored."""
    if not FORMATS[name].number or "parameters" not in FORMATS[name].kinds:
        return
    made = table.Formats((name, "float32"), "float32", ("bf16", "fp16"), False)
    kind, recipe = stored_cases.kind_of(made), cases.recipe_of("adagrad", False, F32, visible=False)
    recipe = recipe._replace(values={**recipe.values, "lr": 0.0, "decay": 0.0, "eps": 1.0})
    kernel = cases.kernel("adagrad", False, F32, kind, (9, 0))
    tops = np.arange(0, 2**16, 7, dtype=np.uint32) << 16
    numbers = (
        np.concatenate([tops + low for low in (0, 1, 0x7F, 0x80, 0x7FFF, 0x8000, 0x8001, 0xFFFF)])
        .astype(np.uint32)
        .view(F32)
    )
    tensor = Stored(made, [numbers, np.zeros(numbers.size, F32), np.ones(numbers.size, F32)])
    wanted = tensor.expected(recipe)
    stored_cases.run(kernel, kind, recipe, [tensor])
    tensor.check(wanted)


@pytest.mark.parametrize("rule, made", stored_cases.ALL, ids=stored_cases.named)
def test_what_the_text_of_a_kernel_for_formats_holds(rule, made):
    number = stored_cases.ALL.index((rule, made))
    kernel = cases.kernel(rule, bool(number % 2), F32, stored_cases.kind_of(made), cases.ARCHITECTURES[number % 4])
    operations = " ".join(kernel.opcodes)
    assert not re.search(r"\bfma|approx|full|ftz|\bcall|\.local|f64|\bdiv\.[su]|\brem", operations)
    assert not re.search(r"\b(add|sub|mul)\.f", operations)
    assert kernel.exchanges == made.in_blocks
    if not made.in_blocks:
        assert operations.count("bra") <= 5
        assert moved(operations, "ld") == once_and_four([*made.written, made.grad])
        assert moved(operations, "st") == once_and_four([*made.written, *made.copies])


def moved(operations, what):
    """The bytes of each load or store of a kernel, sorted; a vector may be one of wider elements."""
    found = re.findall(rf"{what}\.global\.(?:v(\d)\.)?\w(\d+)", operations)
    return sorted(int(lanes or 1) * int(width) // 8 for lanes, width in found)


def once_and_four(names):
    """The bytes of an element, and of a vector of four, of each array of these formats, sorted."""
    found = [dtype.itemsize for name in names for dtype in stored_cases.dtypes_of(name)]
    return sorted([*found, *(4 * size for size in found)])


def test_a_thread_that_does_not_come_to_an_exchange_is_noticed():
    rule, made = next((rule, made) for rule, made in stored_cases.ALL if made.in_blocks)
    kind, recipe = stored_cases.kind_of(made), cases.recipe_of(rule, False, F32, visible=True)
    text = cases.text(rule, False, F32, kind, (9, 0))
    start = text.index("shfl.sync")
    spoiled = text[:start] + "@%p1 bra $L__never;\n\t" + text[start:].replace("ret;", "$L__never:\n\tret;", 1)
    tensor = Stored(made, stored_cases.start(rule, formats.Q8_BLOCK - 1))
    predicate = re.search(r"setp\.\w+\.\w+\s+(%p\d+)", text[:start]).group(1)
    valid = re.findall(r"setp\.gt\.u32\s+(%p\d+)", text[:start])
    spoiled = spoiled.replace("@%p1 bra $L__never", f"@{(valid or [predicate])[-1]} bra $L__never")
    with pytest.raises(IndexError, match="without all threads of a warp"):
        stored_cases.run(execute.Kernel(spoiled), kind, recipe, [tensor])
