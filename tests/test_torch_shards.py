"""fastrms.torch on 1 to 4 ranks: what they do is in torch_shards_program.py, which runs here in processes of its own."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="not installed: torch")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed"),
]

PROGRAM = Path(__file__).parent / "torch_shards_program.py"
EXAMPLE = Path(__file__).parent.parent / "examples" / "fsdp2.py"
RANKS = [4, 1, 2, 3]  # in this order checkpoints are read by fewer and by more ranks than have written them
LIMIT = 120  # seconds


def functions():
    """The functions of the program that ranks run, which have one argument, folder; it is not imported here."""
    found = (x for x in ast.parse(PROGRAM.read_text()).body if isinstance(x, ast.FunctionDef))
    return [x.name for x in found if [argument.arg for argument in x.args.args] == ["folder"]]


def run(ranks, folder):
    """Let so many processes run the program; they have ended, or are killed."""
    command = [sys.executable, "-W", "ignore::FutureWarning", str(PROGRAM)]
    environment = {**os.environ, "FASTRMS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    options = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank), str(ranks), str(folder)], **options) for rank in range(ranks)]
    try:
        return "\n".join(process.communicate(timeout=LIMIT)[1] for process in processes)
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """outcome(function, ranks): the tracebacks of the ranks; all functions run when one of them is asked for."""
    folder, errors = tmp_path_factory.mktemp("ranks"), {}

    def of(function, ranks):
        if ranks not in errors:
            errors[ranks] = run(ranks, folder)
        files = [folder / f"{function} {rank} of {ranks}" for rank in range(ranks)]
        said = [path.read_text() if path.exists() else f"it did not run: {errors[ranks]}" for path in files]
        return "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(said) if text)

    return of


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("function", functions())
def test_ranks(outcome, function, ranks):
    assert not outcome(function, ranks)


def ended(command, environment):
    """A program that has ended; it is started again, at most five times, where torch has aborted it at its end: a thread of
    gloo lets go of its last tensor then, for which it needs a Python that has ended (torch 2.13, before CPython 3.14)."""
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment, check=False)
        if "terminate called without an active exception" not in done.stderr:
            break
    return done


def test_the_example_gives_the_same_norms_on_1_and_2_ranks():
    """Started as users start it, by torchrun where there are 2."""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    norms = []
    for before, environment in (([], alone), (torchrun, {})):
        done = ended([sys.executable, *before, str(EXAMPLE)], {**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        norms += [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("norms ")]
    alone, together = ([float(word) for word in line] for line in norms)
    assert alone == pytest.approx(together, rel=2e-3) and len(alone) == 8
