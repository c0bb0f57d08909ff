"""fastrms.mpi on 1 to 4 ranks: what they do is in mpi_program.py, which mpiexec runs here."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_readme import PAGES, ROOT, example, page

import fastrms

PROGRAM = ROOT / "tests" / "mpi_program.py"
MPIEXEC = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
RANKS = [1, 2, 3, 4]
LIMIT = 120  # seconds


def missing():
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed (extra `mpi`)"
    return None if MPIEXEC else "there is no mpiexec (extra `mpi` brings one)"


needs_mpi = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def start(ranks, folder, *functions, before=(), **environment):
    """mpiexec of these functions of mpi_program.py; it has ended, and its output is returned."""
    command = [MPIEXEC, "-n", str(ranks), *before, sys.executable, str(PROGRAM), str(folder), *functions]
    environment = {**os.environ, "FASTRMS_NUM_THREADS": "1", "PYTHONWARNINGS": "error", **environment}
    return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)


def succeed(ranks, folder, *functions):
    done = start(ranks, folder, *functions)
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error*")))
    assert done.returncode == 0 and not errors, f"{errors}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@needs_mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_ranks_do_what_one_process_does(tmp_path, ranks):
    succeed(ranks, tmp_path, "equal_to_one_process", "near_one_process", "other_structures", "some_have_no_gradient")


@needs_mpi
@pytest.mark.parametrize("ranks", RANKS)
def test_errors_are_those_of_all_ranks(tmp_path, ranks):
    succeed(ranks, tmp_path, "errors", "counted")


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_that_differ_are_refused_on_all(tmp_path, ranks):
    succeed(ranks, tmp_path, "differences")


@needs_mpi
@pytest.mark.parametrize("written", RANKS)
def test_a_checkpoint_of_some_ranks_is_read_by_others(tmp_path, written):
    pytest.importorskip("safetensors")
    succeed(written, tmp_path, "write_checkpoint")
    for ranks in RANKS:
        succeed(ranks, tmp_path, "read_checkpoint")


# A shell that does not end before all survivors have left their files: mpiexec, which kills the other ranks when one dies,
# sees nothing of a death below it.
SHELL = """
trap "" USR1
"$@"
for second in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30; do
    [ "$(ls "$FOLDER" | grep -c survivor)" -ge "$SURVIVORS" ] && exit 0
    sleep 1
done
"""


def survive(folder, ranks, survivors, function):
    """A run in which ranks are lost: each survivor leaves a file."""
    shell = ["/bin/sh", "-c", SHELL, "sh"]
    done = start(ranks, folder, function, before=shell, FOLDER=str(folder), SURVIVORS=str(len(survivors)))
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error*")))
    found = {path.name for path in folder.glob("survivor*")}
    assert not errors and found == {f"survivor{rank}" for rank in survivors}, (found, errors, done.stderr[-2000:])


@needs_mpi
@pytest.mark.parametrize("how", ["before", "inside", "halfway", "clipped"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_that_is_killed_leaves_the_others_whole(tmp_path, ranks, how):
    (tmp_path / "how").write_text(how)
    survive(tmp_path, ranks, range(ranks - 1), "killed")


@needs_mpi
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_bytes_are_those_that_a_network_sees(tmp_path, ranks):
    """MPICH without shared memory sends everything over TCP, here to the same machine; headers come on top."""
    if not Path("/proc/net/dev").exists():
        pytest.skip("this system does not count the bytes of its loopback in /proc/net/dev")
    tcp = {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ofi", "FI_PROVIDER": "tcp", "UCX_TLS": "tcp"}
    done = start(ranks, tmp_path, "over_tcp", **tcp)
    assert done.returncode == 0, done.stderr[-2000:]
    counted, seen = map(int, (tmp_path / "bytes").read_text().split())
    if seen < counted / 2:
        pytest.skip("this MPI sends nothing over TCP to the same machine")
    assert counted == 4 * 2 * (ranks - 1) * 8 * 2**18 * 4
    assert 0.999 * counted <= seen <= 1.1 * counted  # others may use the loopback, too


@needs_mpi
def test_a_rank_that_never_comes(tmp_path):
    survive(tmp_path, 3, range(3), "raises_outside")


@needs_mpi
def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [MPIEXEC, "-n", "2", sys.executable, "-c", EXAMPLE], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert done.returncode == 0 and done.stdout.replace("\n", "") == "33", done


EXAMPLE = f"""
import numpy as np
import fastrms.mpi
w, b = np.ones(5, np.float32), np.ones(3, np.float32)
gw, gb = w * 2, b * 2
{example("fastrms.mpi.ShardedOptimizer(")}
assert (w < 1).all() and (b < 1).all() and info.grad_norm > 0
opt.step({{"w": gw, "b": gb}})
opt.step({{"w": gw, "b": gb}})
print(opt.steps)
"""


def test_without_mpi4py_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ImportError, match="needs mpi4py and an MPI: pip install mpi4py mpich"):
        fastrms.mpi.ShardedOptimizer(None, [np.ones(3)], fastrms.Adam)


def test_buckets_cut_tensors_between_blocks():
    """Every element once, in pieces that begin and end at blocks; ranks get equal shares but for a block."""
    from fastrms import mpi

    block = 4096
    for sizes in ([10 * block + 7, 0, 5, 3 * block, 0], [1], [0], [5] * 1000, [30 * block + 1, 2]):
        numbered = list(enumerate(sizes, 10))
        for ranks in (1, 2, 3, 8):
            for bucket in (block, 5 * block, 1 << 22):
                seen, buckets = {k: [] for k, _ in numbered}, mpi.cut(numbered, ranks, bucket)
                for made in buckets:
                    assert made.edges == sorted(made.edges) and len(made.edges) == ranks + 1
                    for rank in range(ranks):
                        pieces = list(made.pieces(rank, 0))
                        assert sum(piece.stop - piece.start for piece in pieces) == made.counts[rank]
                        for piece in pieces:
                            seen[piece.tensor].append((piece.start, piece.stop))
                for k, size in numbered:
                    found = sorted(set(part for part in seen[k] if part[0] < part[1]))
                    assert seen[k] and [start for start, _ in found] == [0, *(stop for _, stop in found[:-1])][: len(found)]
                    assert (found[-1][1] if found else 0) == size
                    assert all(start % block == 0 for start, _ in found)
                if sum(sizes) > 20 * block:
                    shares = [sum(made.counts[rank] for made in buckets) for rank in range(ranks)]
                    assert max(shares) - sum(sizes) / ranks <= block * len(buckets)


def test_the_table_of_costs_is_that_of_the_model():
    """The lines of docs/mpi.md, for Adam on 7e9 elements."""
    from fastrms import mpi

    lines = re.findall(r"^\| (\d+) \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) GB \| ([\d.]+) s \|$", page("mpi"), re.M)
    assert [int(line[0]) for line in lines] == [1, 2, 4, 8, 16, 64, 256, 1024]
    for ranks, sent, memory, states, seconds in lines:
        cost = mpi.cost(7_000_000_000, int(ranks))
        assert (sent, memory, seconds) == (f"{cost.sent / 1e9:.1f}", f"{cost.memory / 1e9:.1f}", f"{cost.seconds:.2f}")
        assert states == f"{2 * 28 / int(ranks):.2f}"


def test_the_pages_of_ranks_are_linked():
    text = PAGES[ROOT / "README.md"]
    assert "docs/mpi.md" in text and "docs/shards.md" in text
