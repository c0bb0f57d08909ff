"""How many threads a large step uses: min(affinity, cgroup quota), shared with the other ranks that a launcher has started
on this machine, lowered by OMP_NUM_THREADS, overridden by FASTRMS_NUM_THREADS and set_num_threads.  Results never depend on
it."""

import math
import os

from . import backends
from .words import kind_of, shown

MOST = 64
LONGEST = 4096  # bytes of a path; Linux takes no longer ones
RANKS_HERE = {  # what launchers set to the number of ranks on this machine
    "LOCAL_WORLD_SIZE": "torchrun",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "Open MPI",
    "MPI_LOCALNRANKS": "MPICH",
    "PMI_LOCAL_SIZE": "MPICH",
    "SLURM_NTASKS_PER_NODE": "Slurm",
}
_c = backends.load("c")
_without_c = None


def set_num_threads(n):
    """Let large steps use several threads, for the whole process.

    On the C backend these are steps of 320 Ki elements and more, and in a loop in which at most 100 us lie between two steps
    of 32 Ki and more, once it has had 320 Ki elements.  In such a loop, threads that have nothing to do wait awake for up to
    100 us after a step, so that the next one finds them ready; they never do so on the CPU that the caller runs on.

    Parameters
    ----------
    n : int
        The most threads that a step uses, from 1 to 64.

    Raises
    ------
    TypeError, ValueError
        For an n that is not an int, or is out of this range.
    """
    if isinstance(n, bool) or not isinstance(n, int):
        raise TypeError(f"n={shown(n)} is {kind_of(n)}; it must be an int")
    if not 1 <= n <= MOST:
        raise ValueError(f"n={shown(n)} must be from 1 to {MOST}")
    _set(n)


def get_num_threads():
    """The number of threads that a large step uses.

    Returns
    -------
    int
    """
    return count()


count = _c.lib.fastrms_get_num_threads if _c.lib else lambda: _without_c  # C itself, without a Python function around it


def _set(n):
    global _without_c
    if _c.lib:
        _c.lib.fastrms_set_num_threads(n)
    else:
        _without_c = n


def default_num_threads(environment=os.environ):
    """The number of threads that the environment variables ask for, or that the machine allows this process."""
    said = environment.get("FASTRMS_NUM_THREADS", "")
    if said:
        if not 1 <= _whole(said) <= MOST:
            raise ValueError(f"FASTRMS_NUM_THREADS={said!r} must be a number from 1 to {MOST}")
        return _whole(said)
    lowered = _whole(environment.get("OMP_NUM_THREADS", "").split(",")[0].strip())
    ranks, variable = ranks_here(environment)
    if variable == "LOCAL_WORLD_SIZE" and lowered == 1:  # torchrun sets it for whoever has not
        lowered = 0
    return min(share_of_cpus(ranks), lowered or MOST, MOST)


def ranks_here(environment=os.environ):
    """(number of ranks that share this machine, the variable that says so); (1, None) where no launcher says it."""
    for variable in RANKS_HERE:
        ranks = _whole(environment.get(variable, ""))
        if ranks > 1:
            return ranks, variable
    return 1, None


def share_of_cpus(ranks):
    """The CPUs of one of so many ranks.  A launcher may have bound each rank to CPUs of its own; where it has not, the ranks
    share those of the launcher, which is their parent process."""
    return usable_cpus() if ranks == 1 else max(1, min(usable_cpus(), launcher_cpus() // ranks))


def launcher_cpus():
    return math.ceil(min(_allowed_cpus(os.getppid()), cgroup_quota()))


def said_of_ranks(environment=os.environ):
    """Why a rank uses so many threads, as a text; None where no launcher has started several ranks on this machine."""
    ranks, variable = ranks_here(environment)
    if variable is None:
        return None
    asked = environment.get("FASTRMS_NUM_THREADS", "")
    wins = f"; FASTRMS_NUM_THREADS={asked} wins" if asked else ""
    return (
        f"{ranks} on this machine, which share {launcher_cpus()} CPUs ({variable} of {RANKS_HERE[variable]}): "
        f"{share_of_cpus(ranks)} for each{wins}"
    )


def said_of_limits(environment=os.environ):
    """What the number of threads is made of, as a text."""
    named = [f"{name}={environment[name]}" for name in ("OMP_NUM_THREADS", "FASTRMS_NUM_THREADS") if environment.get(name)]
    quota = "none" if cgroup_quota() == math.inf else f"{cgroup_quota():g} CPUs"
    return ", ".join([f"{_allowed_cpus()} CPUs in the affinity mask", f"cgroup quota: {quota}", *named])


def _whole(text):
    """The whole number that a text of digits stands for; 0 for any other text, and for more digits than an int64 has."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else 0


def usable_cpus(root="/"):
    """The CPUs of the affinity mask, or the cgroup quota, rounded up, where that is less; at least 1."""
    return max(1, math.ceil(min(_allowed_cpus(), cgroup_quota(root))))


def _allowed_cpus(process=0):
    try:
        return len(os.sched_getaffinity(process))
    except Exception:  # a sandbox may forbid it, and other systems do not have it: it is only asked for convenience
        return os.cpu_count() or 1


def cgroup_quota(root="/"):
    """The number of CPUs that the cgroups of this process (v1 and v2, every level) allow; inf without a limit."""
    rows = lines(os.path.join(root, "proc/self/cgroup"))
    quotas = [math.inf]
    for row in rows:
        _, controllers, path = (*row.split(":", 2), None, None)[:3]
        if path is None:  # a malformed row
            continue
        if controllers == "":
            quotas += [_quota(folder, "cpu.max") for folder in _levels(os.path.join(root, "sys/fs/cgroup"), path)]
        elif "cpu" in controllers.split(","):
            for mount in ("cpu", "cpu,cpuacct"):
                folders = _levels(os.path.join(root, "sys/fs/cgroup", mount), path)
                quotas += [_quota(folder, "cpu.cfs_quota_us", "cpu.cfs_period_us") for folder in folders]
    return min(quotas)


def _levels(mount, path):
    parts = [part for part in path[:LONGEST].split("/") if part not in ("", "..")]
    return [os.path.join(mount, *parts[:k]) for k in range(len(parts) + 1)]


def _quota(folder, *files):
    """The CPUs that the quota and the period in these files allow, both in microseconds; inf where one is no number above 0,
    as "max"."""
    words = [word for file in files for line in lines(os.path.join(folder, file)) for word in line.split()]
    quota, period = map(_whole, words) if len(words) == 2 else (0, 0)
    return quota / period if quota and period else math.inf


def lines(path):
    """The lines of a small file of the system; none where it cannot be read.  Any bytes may stand in it, and any number."""
    try:
        with open(path, "rb") as file:
            return os.fsdecode(file.read(1 << 16)).split("\n")
    except (OSError, ValueError):  # a path with a zero byte is a ValueError
        return []


def join_threadpoolctl():
    """Let threadpoolctl, where it is installed, see and limit our threads (user_api "fastrms")."""
    try:
        import threadpoolctl

        threadpoolctl.register(_controller(threadpoolctl.LibController))
    except Exception:  # it is absent, too old or broken: then it does not see our threads
        pass


def _controller(base):
    class FastrmsController(base):
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

    return FastrmsController


_set(default_num_threads())
if _c.lib:
    _c.lib.fastrms_set_wait_awake(usable_cpus() > 1)
    join_threadpoolctl()
