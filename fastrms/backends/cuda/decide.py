"""``nonfinite="skip"``, decided on the device: whether a step is made, and with which coefficients.

The kernel `decide` of norm_kernels.py adds up the counts of what is not finite, counts the step where there is none, and
copies the coefficients of the step with the number that it has then from rows that the host has written ahead, as it does
not know this number: each step that it has launched and not yet seen may have been left out.  The host reads the counts in
memory of its own, into which the kernel writes them, and waits only where it is asked for them.
"""

import numpy as np

from ...memory import device
from .driver import write
from .launch import AHEAD, Table
from .norm import SLOTS, Launches

WORD = 1 << 32
TOO_OFTEN = f"advance() was called {AHEAD - 1} times more often than a graph was launched: call it once before each launch"
TOO_LATE = f"what this step found was not asked for within {SLOTS} steps, and is no longer there"


class Decision:
    """The decisions of one plan.

    looked : how many steps were launched, left out or not
    made : how many steps were made, as far as the host has seen
    sure : whether `looked` is known, which it is not after a step that was cut off before or after its launch
    """

    def __init__(self, index, allocate):
        self.index, self.table = index, Table()
        self.state = allocate(3, np.dtype(np.uint64), index)  # steps looked at, steps made, what the last one found
        self.seen = device.HostMemory(1 + SLOTS, index)  # the first two as halves of one word; what each step found
        self.looked, self.made, self.sure = 0, 0, True
        self._unsent = np.zeros(3, np.uint64)

    def aim(self, nonfinite, launches, zero_grad, allocate):
        """Set the counts of a norm.Nonfinite, and the launches whose coefficients are chosen."""
        rows = [
            (each.device_row.address, each.ahead.address, each.device_row.nbytes // 4, each.rows - 1) for each in launches
        ]
        (targets,) = self.table.set([np.array(rows, np.uint64).reshape(-1)], allocate, self.index)
        head = nonfinite.sums, nonfinite.segments, self.state.address, self.seen.address, targets, len(rows)
        self._decide = Launches([("decide", head, np.empty(0), 1)], self.index)
        self._zeros = nonfinite.zeros(self.state) if zero_grad else None

    def send(self, handle):
        """Write to the device what the host has changed."""
        self.table.send(handle)
        if self._unsent is not None:
            write(self.state.address, self._unsent, handle)
            self._sent, self._unsent = self._unsent, None  # the driver may not have read it yet

    def launch(self, handle):
        """Decide about a step whose nonfinite elements are counted."""
        self._decide.launch(handle)

    def zero(self, handle):
        """Write zeros over the gradients of a step that is left out."""
        if self._zeros is not None:
            self._zeros.launch(handle)

    def see(self):
        """(steps made, how many of those that were launched are not decided yet); less than none are where a graph was
        launched more often than advance() was called.  Any thread may ask, so this builds on nothing it has read before."""
        word = int(self.seen.array[0])
        self.made = made = nearest(self.made, word % WORD)
        return made, self.looked - nearest(self.looked, word // WORD)

    def numbers(self, handle, waits):
        """The least and the largest number that the next step may have.  waits: whether the host may wait where too many
        steps are undecided."""
        made, undecided = self.see()
        if waits and (undecided >= AHEAD - 1 or not self.sure):
            made, undecided = self.settle(handle)
            if undecided >= AHEAD - 1:  # of which nothing was launched
                self.looked -= undecided
                raise RuntimeError(TOO_OFTEN)
        if undecided < 0 or (waits and not self.sure):
            self.looked, self.sure, undecided = self.looked - undecided, True, 0
        return made + 1, made + 1 + undecided

    def settle(self, handle):
        """Wait until all steps are decided that were launched, first for this stream, then for the device; returns what
        see() does."""
        for function, *stream in (("cuStreamSynchronize", handle), ("cuCtxSynchronize",)):
            if self.see()[1]:
                device.call_driver("this step or work before it", function, *stream)
        return self.see()

    def set(self, steps):
        """Let `steps` be the number of steps made; none is undecided."""
        unsent, word = np.array([self.looked, steps, 0], np.uint64), self.looked % WORD * WORD + steps % WORD
        self.made, self._unsent, self.seen.array[0] = steps, unsent, word  # in one statement: Ctrl-C comes in calls

    def found(self, number):
        """How many elements step `number` of all that were launched found, which is decided; None: the last one."""
        if number is None:
            number = nearest(self.looked, int(self.seen.array[0]) // WORD)
        if self.looked - number >= SLOTS:
            raise RuntimeError(TOO_LATE)
        return int(self.seen.array[1 + number % SLOTS])


def nearest(number, low):
    """The number nearest to `number` that has these last 32 bits."""
    return number + (low - number + WORD // 2) % WORD - WORD // 2


assert AHEAD == SLOTS  # the kernel has the number of both
