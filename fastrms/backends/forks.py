"""A gate for forks: no Python plan is in the middle of a step when the process forks."""

import os
import threading
import weakref

PAUSE = 1e-4  # seconds to wait before another look at whether a step or a fork is under way


class Forks:
    """A fork takes the locks of all plans, and gives them back in the parent and in the child."""

    def __init__(self):
        self.plans = weakref.WeakSet()
        self.lock = threading.Lock()
        self.number = 0  # odd while a fork is under way
        self.locked = []
        if hasattr(os, "register_at_fork"):  # else this system has no fork
            os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._after)

    def add(self, plan):
        with self.lock:
            self.plans.add(plan)

    def _before(self):
        self.lock.acquire()
        self.number += 1
        self.locked = [plan.lock for plan in self.plans]
        for lock in self.locked:
            lock.acquire()

    def _after(self):
        for lock in self.locked:
            lock.release()
        self.locked = []
        self.number += 1
        self.lock.release()


forks = Forks()
