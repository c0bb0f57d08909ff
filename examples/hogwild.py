"""Four processes train one network at once, without a lock (Hogwild), with the shared RMSProp of A3C (Mnih et al. 2016).

The weights and the running means of RMSProp lie in one block of shared memory.  Each process has its own gradients and its
own optimizer over that block.  The learning rate falls to 0 over the steps of each process, and the norm of the gradient is
clipped.  Processes read and write the same numbers at the same time: docs/shared-memory.md says what that may lose.

Run with `python examples/hogwild.py`; prints the test accuracy and the time of one process and of four, which make as many
steps together.
"""

import argparse
import multiprocessing
import os
import sys
import time
from multiprocessing import shared_memory

import numpy as np
from network import Network, batches

import fastrms

SIZES = 64, 32, 10  # pixels, hidden units, digits
BATCH, LEARNING_RATE, CLIP_NORM = 32, 0.003, 1.0
PATIENCE = 120  # seconds that processes wait for each other


def new_block(random):
    """A block of shared memory that holds the weights of a new network, and means of 0."""
    weights = Network(SIZES, random).weights
    block = shared_memory.SharedMemory(create=True, size=2 * sum(weight.nbytes for weight in weights))
    flat = fastrms.FlatBuffer.like(weights, data=block.buf)
    state_in(block, flat)[...] = 0
    return block


def state_in(block, flat):
    """The array for RMSProp's running means, which follow on the weights of a FlatBuffer in a block."""
    return np.frombuffer(block.buf, np.float32, flat.data.size, offset=flat.data.nbytes)


def network_in(block):
    """(network, flat): a network whose weights are in a block, and the FlatBuffer of its weights and own gradients."""
    network = Network(SIZES, np.random.default_rng())
    flat = fastrms.FlatBuffer([weight.shape for weight in network.weights], data=block.buf)
    network.weights, network.gradients = list(flat.params.values()), list(flat.grads.values())
    return network, flat


def train(block, barrier, chosen, images, digits):
    """Update the weights in a block once for each batch: an array of indices in `chosen`."""
    network, flat = network_in(block)

    def rate(step):
        return LEARNING_RATE * (1 - step / len(chosen))

    optimizer = fastrms.RMSProp(flat, lr=rate, state={"square_avg": state_in(block, flat)})
    optimizer.bind(flat.grads)
    barrier.wait(PATIENCE)
    for batch in chosen:
        network.backward(images[batch], digits[batch])
        optimizer.step(clip_norm=CLIP_NORM)
    barrier.wait(PATIENCE)


def work(name, barrier, *arguments):
    """What a process does.  It uses one thread: the other processors have processes of their own."""
    fastrms.set_num_threads(1)
    block = shared_memory.SharedMemory(name)
    try:
        train(block, barrier, *arguments)
        block.close()  # no array lies over it any more
    except BaseException:
        barrier.abort()  # nobody shall wait for this process
        raise


def train_at_once(count, passes, data, seed):
    """Train with `count` processes; returns (seconds, test accuracy)."""
    images, test_images, digits, test_digits = data
    random = np.random.default_rng(seed)
    chosen = [batch for _ in range(passes) for batch in batches(BATCH, len(images), random)]
    block = new_block(random)
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(count + 1)
    shares = [(block.name, barrier, chosen[k::count], images, digits) for k in range(count)]
    processes = [context.Process(target=work, args=share, daemon=True) for share in shares]
    try:
        for process in processes:
            process.start()
        barrier.wait(PATIENCE)
        start = time.perf_counter()
        barrier.wait(PATIENCE)
        seconds = time.perf_counter() - start
        for process in processes:
            process.join()
        return seconds, network_in(block)[0].accuracy(test_images, test_digits)
    finally:
        block.close()
        block.unlink()


def digits_in_parts():
    """Training images, test images, training digits, test digits."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "sklearn":
            raise
        sys.exit("sklearn is missing, which this example needs: pip install -e '.[examples]'")
    images, digits = load_digits(return_X_y=True)
    return train_test_split((images / 16).astype(np.float32), digits, test_size=0.25, random_state=0, stratify=digits)


def main(arguments=None):
    """Train with one process and with several; returns number of processes -> test accuracy."""
    parser = argparse.ArgumentParser(description="Trains a network on digits by several processes at once.")
    parser.add_argument("--processes", type=int, default=4, help="processes at once (default: 4)")
    parser.add_argument("--passes", type=int, default=60, help="passes over the images, of all together (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="of first weights and batches (default: 0)")
    options = parser.parse_args(arguments)
    if min(options.processes, options.passes) < 1:
        parser.error("--processes and --passes must be at least 1")
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")  # for NumPy in the processes, which have one processor each
    data, accuracies = digits_in_parts(), {}
    for count in dict.fromkeys((1, options.processes)):
        seconds, accuracies[count] = train_at_once(count, options.passes, data, options.seed)
        print(f"{count} process(es): test accuracy {accuracies[count]:.1%}, {seconds:.2f} s")
    return accuracies


if __name__ == "__main__":
    main()
