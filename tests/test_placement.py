"""Promise 3, the part that needs no clock: our buffers start where they do not evict those beside them, and a step
allocates nothing.  What it is worth in time is measured by `python -m bench.figures`."""

import itertools
import tracemalloc

import numpy as np
import pytest
from conftest import CLASSES, DTYPES

import fastrms
from fastrms.memory import host, placement

SIZE = 1 << 17


def address(array):
    return host.ours(array).address


@pytest.mark.parametrize("make, options", [
    (fastrms.RMSProp, {}), (fastrms.RMSProp, {"momentum": 0.9, "centered": True}), (fastrms.AdaGrad, {}), (fastrms.Adam, {}),
    (fastrms.Adam, {"amsgrad": True}), (fastrms.RProp, {}),
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES)
def test_states_lie_apart_modulo_a_page(make, options, dtype):
    """Parameters and gradients back to back in one power-of-two arena collide; no state joins them."""
    arena = np.ones(2 * SIZE, dtype)
    param, grad = arena[:SIZE], arena[SIZE:]
    states = make(param, **options).state.values()
    starts = [address(param), *map(address, states)]
    assert placement.distance(address(param), address(grad)) == 0
    for a, b in itertools.combinations(starts, 2):
        assert placement.distance(a, b) >= placement.NEAR
    assert all(start % placement.LINE == 0 for start in starts[1:])
    name = "rprop" if make is fastrms.RProp else make.__name__.lower()
    for state in (fastrms.init_state(name, param, **options),):
        starts = [address(param), *map(address, state.values())]
        assert min(placement.distance(a, b) for a, b in itertools.combinations(starts, 2)) >= placement.NEAR


def test_report_names_buffers_that_collide():
    arena = np.ones(4 * SIZE, np.float32)
    optimizer = fastrms.RMSProp({"w": arena[:SIZE], "u": arena[SIZE : 2 * SIZE]})
    grads = {"w": arena[2 * SIZE : 3 * SIZE], "u": arena[3 * SIZE :]}
    optimizer.bind(grads)
    text = optimizer.report()
    assert "params['w'] and grads['w'] start at nearly the same offset" in text and "further on" in text
    assert "params['w'] and params['u']" not in text  # never read side by side
    apart = fastrms.RMSProp(placement.place(SIZE, np.dtype(np.float32), []))
    apart.bind(placement.place(SIZE, np.dtype(np.float32), [apart._tensors[0].param.address]))
    assert "offset" not in apart.report()


@pytest.mark.parametrize("size", [4096, 5003, 16384, 50_000])
@pytest.mark.parametrize("make, options", [
    (fastrms.RMSProp, {"momentum": 0.9, "centered": True}), (fastrms.Adam, {"amsgrad": True}), (fastrms.RProp, {}),
])  # fmt: skip
def test_small_states_lie_256_bytes_apart_modulo_a_page(make, options, size):
    """Beside parameters that start anywhere in a page."""
    arena = np.ones(size + 1024, np.float32)
    for start in range(0, 1024, 37):
        param = arena[start : start + size]
        starts = [address(param), *map(address, make(param, **options).state.values())]
        assert min(placement.distance(a, b) for a, b in itertools.combinations(starts, 2)) >= 256


def test_small_buffers_cost_no_slack():
    small = placement.place(64, np.dtype(np.float32), [])
    assert small.base.nbytes <= 64 * 4 + placement.LINE
    assert address(small) % placement.LINE == 0


@pytest.mark.parametrize("make", CLASSES)
@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_step_allocates_nothing_per_element(make, clip_norm):
    """On the C backend; a few hundred bytes of Python objects, whatever the size."""
    if "c" not in fastrms.available_backends():
        pytest.skip("without the C extension")
    param, grad = np.ones(1 << 20, np.float32), np.ones(1 << 20, np.float32)
    optimizer = make(param, backend="c")
    optimizer.step(grad, clip_norm=clip_norm)
    tracemalloc.start()
    try:
        for _ in range(3):
            optimizer.step(grad, clip_norm=clip_norm)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4096
