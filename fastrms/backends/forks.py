"""A gate for forks: no Python plan is in the middle of a step when the process forks."""

import os
import threading
import weakref

PAUSE = 1e-4  # seconds to wait before another look at whether a step or a fork is under way


class Forks:
    """A fork takes the locks of all plans, and gives them back in the parent and in the child.

    The handlers of a fork run in the reverse order in which they were registered.  Ours are registered by the first plan:
    logging, which a step may use, has usually been imported then.  Were its handler first, the fork would wait for a step
    while it has the lock of logging, for which the step waits.
    """

    def __init__(self):
        self.plans = weakref.WeakSet()
        self.lock = threading.Lock()
        self.number = 0  # odd while a fork is under way
        self.locked = []
        self.registered = not hasattr(os, "register_at_fork")  # this system has no fork
        if not self.registered:
            os.register_at_fork(after_in_child=self._renew)

    def add(self, plan):
        with self.lock:
            if not self.registered:
                os.register_at_fork(before=self._before, after_in_parent=self._after, after_in_child=self._after)
                self.registered = True
            self.plans.add(plan)

    def _before(self):
        self.lock.acquire()
        self.number += 1
        self.locked = [plan.lock for plan in self.plans]
        for lock in self.locked:
            lock.acquire()

    def _renew(self):
        if self.number % 2 == 0:  # nobody has waited for the thread that may have had the lock
            self.lock = threading.Lock()

    def _after(self):
        if self.number % 2 == 0:  # registered since this fork began
            return
        for lock in self.locked:
            lock.release()
        self.locked = []
        self.number += 1
        self.lock.release()


forks = Forks()
