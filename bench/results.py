"""Results of a run: the timing of each rule, size and contender, and what follows from it."""

from .contenders import CEILING, IN_PLACE, NAIVE, NAMES, bytes_per_element


class Results:
    """Timings by (rule, size, contender), in the order in which they were measured."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.timings = {}

    def add(self, rule, size, timings):
        self.timings.update({(rule, size, contender): timing for contender, timing in timings.items()})

    def rules(self):
        return list(dict.fromkeys(rule for rule, _, _ in self.timings))

    def sizes(self):
        return sorted({size for _, size, _ in self.timings})

    def contenders(self):
        measured = {contender for _, _, contender in self.timings}
        return [name for name in NAMES if name in measured]

    def nanoseconds(self, rule, size, contender):
        """Of one call, the minimum over the rounds; None where it was not measured."""
        timing = self.timings.get((rule, size, contender))
        return timing and timing.minimum

    def per_element(self, rule, size, contender):
        taken = self.nanoseconds(rule, size, contender)
        return taken and taken / size

    def bandwidth(self, rule, size, contender):
        """Gigabytes per second of what the update has to move, whatever the contender moves beside it."""
        taken = self.per_element(rule, size, contender)
        return taken and bytes_per_element(rule, self.dtype) / taken

    def over_naive(self, rule, size, contender):
        return self._times(rule, size, NAIVE, contender)

    def over_in_place(self, rule, size, contender):
        return self._times(rule, size, IN_PLACE, contender)

    def share_of_ceiling(self, rule, size, contender):
        times = self._times(rule, size, CEILING, contender)
        return times and 100 * times

    def _times(self, rule, size, reference, contender):
        """How many times as fast as the reference."""
        slow, fast = self.nanoseconds(rule, size, reference), self.nanoseconds(rule, size, contender)
        return slow and fast and slow / fast
