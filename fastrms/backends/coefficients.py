"""Rows of coefficients, made for several steps at once: a single row costs Python 5 us, each of 4096 at once 0.1 us."""

import math

import numpy as np


class Coefficients:
    """The coefficients of the updates number `first` to `end` - 1 by one recipe, rounded once from double to its dtype.

    rows: one row of coefficients per update, or a single row that serves all where no coefficient changes.
    """

    def __init__(self, recipe):
        self.recipe = recipe
        self.rows = self._scale = None
        self.first = self.end = 0

    def have(self, step, grad_scale, most_rows):
        """Make the row of update number `step`, unless it is there.  Where the recipe knows the coefficients of later
        updates, their rows are made with it, at most `most_rows` rows in all."""
        known = grad_scale == self._scale
        if known and self.first <= step < self.end:
            return
        recipe = self.recipe
        several = recipe.ahead and not recipe.fixed and known  # a grad_scale that has just changed may not come again
        count = min(8 * len(self.rows), most_rows) if several else 1
        now = recipe.at(step, grad_scale)
        with np.errstate(over="ignore", under="ignore"):
            rows = np.empty((count, len(now)), recipe.dtype)
            rows[:] = now
            for index, column in recipe.ahead(step, count) if count > 1 else ():
                rows[:, index] = column
        of = (0, math.inf) if recipe.fixed else (step, step + count)
        self.rows, self._scale, (self.first, self.end) = rows, grad_scale, of  # without a call: Ctrl-C comes in calls


def rows_each(count):
    """How many rows each of `count` Coefficients may make at once: 4096 shared among them, but at least 16 for each."""
    return max(16, 4096 // max(1, count))
