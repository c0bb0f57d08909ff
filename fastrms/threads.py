"""How many threads a large step uses: min(affinity, cgroup quota), lowered by OMP_NUM_THREADS, overridden by
FASTRMS_NUM_THREADS and set_num_threads.  Results never depend on it."""

import math
import os

from . import backends

MOST = 64
_c = backends.load("c")
_without_c = None


def set_num_threads(n):
    """Let large steps (64 Ki elements on the C backend) use up to n threads (1 to 64), for the whole process."""
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n={n!r} is a {type(n).__name__}; it must be an int")
    if not 1 <= n <= MOST:
        raise ValueError(f"n={n!r} must be from 1 to {MOST}")
    _set(n)


def get_num_threads():
    """The number of threads that a large step uses."""
    return count()


count = _c.lib.fastrms_get_num_threads if _c.lib else lambda: _without_c  # without a frame of Python around it


def _set(n):
    global _without_c
    if _c.lib:
        _c.lib.fastrms_set_num_threads(n)
    else:
        _without_c = n


def default_num_threads(environment=os.environ):
    """What the environment and the machine give this process."""
    said = environment.get("FASTRMS_NUM_THREADS", "")
    if said:
        if not said.isdigit() or not 1 <= int(said) <= MOST:
            raise ValueError(f"FASTRMS_NUM_THREADS={said!r} must be a number from 1 to {MOST}")
        return int(said)
    lowered = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    limit = int(lowered) if lowered.isdigit() and int(lowered) > 0 else MOST
    return min(usable_cpus(), limit, MOST)


def usable_cpus(root="/"):
    """CPUs of the affinity mask, or of the cgroup quota rounded up where that is less."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_quota(root)
    return max(1, min(cpus, math.ceil(quota))) if quota < math.inf else cpus


def cgroup_quota(root="/"):
    """CPUs that the cgroups of this process (v1 and v2, every level) allow; inf without a limit."""
    rows = _lines(os.path.join(root, "proc/self/cgroup"))
    quotas = [math.inf]
    for row in rows:
        _, controllers, path = row.split(":", 2)
        if controllers == "":
            quotas += [_v2(folder) for folder in _levels(os.path.join(root, "sys/fs/cgroup"), path)]
        elif "cpu" in controllers.split(","):
            for mount in ("cpu", "cpu,cpuacct"):
                quotas += [_v1(folder) for folder in _levels(os.path.join(root, "sys/fs/cgroup", mount), path)]
    return min(quotas)


def _levels(mount, path):
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [os.path.join(mount, *parts[:k]) for k in range(len(parts) + 1)]


def _v2(folder):
    words = " ".join(_lines(os.path.join(folder, "cpu.max"))).split()
    return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != "max" else math.inf


def _v1(folder):
    quota = _lines(os.path.join(folder, "cpu.cfs_quota_us"))
    period = _lines(os.path.join(folder, "cpu.cfs_period_us"))
    return int(quota[0]) / int(period[0]) if quota and period and int(quota[0]) > 0 else math.inf


def _lines(path):
    try:
        with open(path) as file:
            return file.read().splitlines()
    except OSError:
        return []


def join_threadpoolctl():
    """Let threadpoolctl, where it is installed, see and limit our threads (user_api "fastrms")."""
    try:
        import threadpoolctl
    except ImportError:
        return

    class FastrmsController(threadpoolctl.LibController):
        user_api = internal_api = "fastrms"
        filename_prefixes = ("_core",)
        check_symbols = ("fastrms_get_num_threads", "fastrms_set_num_threads")

        def get_num_threads(self):
            return self.dynlib.fastrms_get_num_threads()

        def set_num_threads(self, num_threads):
            self.dynlib.fastrms_set_num_threads(num_threads)

        def get_version(self):
            return None

        def set_additional_attributes(self):
            pass

    threadpoolctl.register(FastrmsController)


_set(default_num_threads())
if _c.lib:
    join_threadpoolctl()
