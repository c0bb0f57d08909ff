"""Results of a run: the timing of each rule, size and contender, and what follows from it."""

from .contenders import CEILINGS, FASTRMS, IN_PLACE, NAIVE
from .problem import bytes_per_element

ABOVE = 1.1  # times the ceiling's speed; up to this, the pages of one may just be faster than those of the other
SMALL = 1 << 12  # elements; below it the call is most of the time, and the ceilings say little


class Results:
    """Timings by (rule, size, contender), in the order in which they were measured; all of one dtype and placement."""

    def __init__(self, dtype, placement):
        self.dtype, self.placement = dtype, placement
        self.timings, self.ways, self.reasons, self.compact = {}, {}, {}, set()

    def add(self, rule, size, contenders, timings, reasons):
        """Add timings, by (name, way); the fastest way of a name counts.  reasons: name -> why it does not take part."""
        for contender in contenders:
            cell, timing = (rule, size, contender.name), timings[contender.name, contender.way]
            if cell not in self.timings or timing.minimum < self.timings[cell].minimum:
                self.timings[cell], self.ways[cell] = timing, contender.way
            if contender.compact:
                self.compact.add(contender.name)
        self.reasons.update({(rule, name): reason for name, reason in reasons.items()})

    def rules(self):
        return list(dict.fromkeys(rule for rule, _, _ in self.timings))

    def sizes(self):
        return sorted({size for _, size, _ in self.timings})

    def contenders(self, rule=None):
        """The names of the contenders in the order of a table: NumPy, peers by name, fastrms, ceilings."""
        measured = {name for where, _, name in self.timings if rule in (None, where)}
        known = (NAIVE, IN_PLACE), tuple(FASTRMS.values()), CEILINGS
        peers = sorted(measured.difference(*known))
        return [name for name in (*known[0], *peers, *known[1], *known[2]) if name in measured]

    def peers(self, rule=None):
        return [name for name in self.contenders(rule) if name not in (NAIVE, IN_PLACE, *FASTRMS.values(), *CEILINGS)]

    def nanoseconds(self, rule, size, contender):
        """The time of one call, the minimum over the rounds; None where it was not measured."""
        timing = self.timings.get((rule, size, contender))
        return timing and timing.minimum

    def per_element(self, rule, size, contender):
        taken = self.nanoseconds(rule, size, contender)
        return taken and taken / size

    def bandwidth(self, rule, size, contender):
        """Gigabytes per second of the bytes that the update has to move; what else a contender moves does not count."""
        taken = self.per_element(rule, size, contender)
        return taken and bytes_per_element(rule, self.dtype) / taken

    def times(self, rule, size, slow, fast):
        """How many times as fast `fast` is as `slow`."""
        slow, fast = self.nanoseconds(rule, size, slow), self.nanoseconds(rule, size, fast)
        return slow and fast and slow / fast

    def over_naive(self, rule, size, contender):
        return self.times(rule, size, NAIVE, contender)

    def over_in_place(self, rule, size, contender):
        return self.times(rule, size, IN_PLACE, contender)

    def nearer_ceiling(self, rule, size):
        """The ceiling that takes longer: the one that an update meets first."""
        measured = [name for name in CEILINGS if (rule, size, name) in self.timings]
        return max(measured, key=lambda name: self.nanoseconds(rule, size, name), default=None)

    def share_of_ceiling(self, rule, size, contender):
        """The contender's speed in percent of that of the nearer ceiling."""
        times = self.times(rule, size, self.nearer_ceiling(rule, size), contender)
        return times and 100 * times

    def above_ceiling(self):
        """The (rule, size, contender) of each timing that beats a ceiling, which can only be a disturbed measurement."""
        return [
            cell
            for cell in self.timings
            if cell[1] >= SMALL
            and cell[2] not in (*CEILINGS, *self.compact)
            and (self.share_of_ceiling(*cell) or 0) > 100 * ABOVE
        ]
