"""Python threads without the GIL: on free-threaded CPython these run at once; elsewhere C releases the GIL in a step."""

import sys
import sysconfig
import threading

import numpy as np
import pytest
from conftest import BACKENDS

import fastrms

THREADS, STEPS, SIZE = 8, 200, 1003


def at_once(work):
    """[work(0), ..., work(THREADS - 1)], each in a thread of its own; an exception takes the place of a result."""
    results, ready = [None] * THREADS, threading.Barrier(THREADS)

    def run(k):
        ready.wait()
        try:
            results[k] = work(k)
        except Exception as error:
            results[k] = error

    runners = [threading.Thread(target=run, args=(k,)) for k in range(THREADS)]
    for runner in runners:
        runner.start()
    for runner in runners:
        runner.join()
    return results


@pytest.mark.skipif(not sysconfig.get_config_var("Py_GIL_DISABLED"), reason="this Python has a GIL")
def test_the_import_leaves_the_gil_off():
    assert not sys._is_gil_enabled()


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_thread_its_own_optimizer(backend):
    def train(k):
        param, rng = np.ones(SIZE, np.float32), np.random.default_rng(k)
        optimizer = fastrms.Adam(param, backend=backend)
        for _ in range(STEPS):
            optimizer.step(rng.standard_normal(SIZE, np.float32))
        return param

    for found, alone in zip(at_once(train), map(train, range(THREADS)), strict=True):
        assert np.array_equal(found, alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_optimizer_makes_whole_steps_or_refuses(backend):
    """AdaGrad with gradients of 1: every sum is the number of steps that were made."""
    optimizer, grad = fastrms.AdaGrad(np.ones(SIZE, np.float32), backend=backend), np.ones(SIZE, np.float32)

    def made(_):
        count = 0
        for _ in range(STEPS):
            try:
                optimizer.step(grad)
                count += 1
            except RuntimeError as error:
                assert "in use by another thread" in str(error)
        return count

    steps = sum(at_once(made))
    assert optimizer.steps == steps > 0 and (optimizer.state["sum"] == steps).all()
