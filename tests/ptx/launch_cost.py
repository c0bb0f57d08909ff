"""The driver calls of a bound step of any number of tensors, and what Python takes for one above an empty launch of
cuda.core: `python tests/ptx/launch_cost.py`

The times are those of the driver double, whose launch does nothing then: of the Python of fastrms and its arguments."""

import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch_cases import DRIVER, OnDevice  # noqa: I001  the double comes before anything that asks for a driver

import numpy as np
from cuda.core import LaunchConfig, launch

import fastrms
from fastrms.backends.cuda import driver, toolchain

ROUNDS, CALLS = 200, 200
MAKERS = (fastrms.RMSProp, fastrms.AdaGrad, fastrms.Adam, fastrms.RProp)


def seconds(call):
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


STEPS = {  # what a step is -> (options of the optimizer, of the step)
    "plain": ({}, {}),
    "clip_norm": ({}, {"clip_norm": 1.0}),
    'nonfinite="skip"': ({"nonfinite": "skip"}, {}),
    'nonfinite="skip", clip_norm': ({"nonfinite": "skip"}, {"clip_norm": 1.0}),
    "capturable, lr changes": ({"capturable": True}, {}),
    "state_format": ({"state_format": "bf16"}, {}),
}


def bound_step(make, tensors=1, **options):
    optimizer = make([OnDevice(np.ones(1000, np.float32)) for _ in range(tensors)], **options)
    optimizer.bind([OnDevice(np.ones(1000, np.float32)) for _ in range(tensors)])
    optimizer.step()
    return optimizer


def driver_calls(options, said, tensors):
    """The calls of the third bound step of this kind."""
    optimizer = bound_step(fastrms.Adam, tensors, **options)
    optimizer.step(**said)
    if options.get("capturable"):
        optimizer.lr = 0.5
    return DRIVER.census(lambda: optimizer.step(**said))


def main():
    DRIVER.learn_from(toolchain.compiler())
    for name, kind in STEPS.items():
        calls = driver_calls(*kind, tensors=1)
        assert calls == driver_calls(*kind, tensors=300)
        print(f"{name}: {', '.join(f'{count} {call}' for call, count in calls.items())}")
    DRIVER.library.double_hook(None)
    optimizers = {make.__name__: bound_step(make) for make in MAKERS}
    some = next(iter(optimizers.values()))._plan._updates[0]
    calls = {"empty": partial(launch, driver.stream_of(1), LaunchConfig(grid=1, block=256), some.kernel)}
    calls |= {name: optimizer.step for name, optimizer in optimizers.items()}
    samples = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name, call in calls.items():
            samples[name].append(1e6 * seconds(call))
    empty = samples.pop("empty")
    print(f"empty launch {min(empty):.2f} us (median {statistics.median(empty):.2f})")
    for name, taken in samples.items():
        above = statistics.median(a - b for a, b in zip(taken, empty, strict=True))
        print(f"{name}: {min(taken) - min(empty):.2f} us above it (median of {ROUNDS} rounds {above:.2f})")


if __name__ == "__main__":
    main()
