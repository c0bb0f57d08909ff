"""save() and load(): bit-exact resume, refusals that change nothing, and a writer that may be killed at any moment."""

import json
import os
import pickle
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading

import numpy as np
import pytest
from conftest import BACKENDS, bits
from test_same_bits import OPTIMIZERS

import fastrms
from fastrms import files
from fastrms.schedules import Cosine, Plateau

safetensors = pytest.importorskip("safetensors")
pytest.importorskip("safetensors.numpy")

SHAPES = {"w": (3, 7), "b/é\n": (), 3: (0, 4), "big": (1003,)}


def problem(seed=0):
    """Named parameters of both dtypes, one in Fortran order, and a list of gradients."""
    rng = np.random.default_rng(seed)

    def values():
        made = {key: rng.standard_normal(shape) for key, shape in SHAPES.items()}
        made["w"] = np.asfortranarray(made["w"])
        return {key: np.asarray(x, np.float32 if key in ("w", 3) else np.float64) for key, x in made.items()}

    return values(), [values() for _ in range(6)]


def copied(params):
    return {key: x.copy(order="K") for key, x in params.items()}


def frozen(optimizer):
    return pickle.dumps(optimizer.state_dict())


@pytest.mark.parametrize("make, options", OPTIMIZERS)
def test_resume_has_the_bits_of_an_unbroken_run(make, options, backend, tmp_path):
    """After every step, into an optimizer with other hyper-parameters of the same rule."""
    params, gradients = problem()
    optimizer = make(params, backend=backend, **options)
    for k, gradient in enumerate(gradients):
        optimizer.save(tmp_path / "o")
        resumed = copied(params)
        other = make(resumed, backend=backend, **{**options, "maximize": True})
        other.load(tmp_path / "o")
        assert other.steps == optimizer.steps == k and dict(other.groups[0]) == dict(optimizer.groups[0])
        optimizer.step(gradient), other.step(gradient)
        assert all(np.array_equal(bits(params[key]), bits(resumed[key])) for key in params)
    assert frozen(other) == frozen(optimizer)


def test_values_come_back_exactly(tmp_path):
    """Groups, dialects, schedules, counts that differ, NaN and subnormals in the state, awkward floats."""
    params, gradients = problem()
    names = list(params)
    groups = [
        {"params": {k: params[k] for k in names[:2]}, "lr": 0.1 + 0.2, "eps": 5e-324, "eps_root": 1e-30},
        {"params": [params[k] for k in names[2:]], "lr": Plateau(1e-300, threshold=1 / 3), "clip_value": 1 / 7},
    ]
    optimizer = fastrms.Adam(groups, dialect="keras")
    optimizer.step([{names[0]: gradients[0][names[0]], names[1]: None}, [gradients[0][k] for k in names[2:]]])
    optimizer.groups[1]["lr"].update(-np.inf)
    optimizer.state["exp_avg"][1][1][:4] = [np.nan, -0.0, 5e-324, -np.inf]
    optimizer.save(tmp_path / "o")
    other = fastrms.Adam([{"params": {k: params[k] for k in names[:2]}}, {"params": [params[k] for k in names[2:]]}])
    other.load(str(tmp_path / "o"))
    mine, its = optimizer.state_dict(), other.state_dict()
    assert mine["groups"] == its["groups"] and mine["dialect"] == its["dialect"] == "keras"
    assert [t["steps"] for t in its["tensors"]] == [1, 0, 1, 1]
    for a, b in zip(mine["tensors"], its["tensors"], strict=True):
        for name, array in a["state"].items():
            assert np.array_equal(array.reshape(-1).view(np.uint8), b["state"][name].reshape(-1).view(np.uint8))


def test_the_file_is_readable_without_fastrms(tmp_path):
    w = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    optimizer = fastrms.AdaGrad({"w": w})
    optimizer.step({"w": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))})
    optimizer.save(tmp_path / "o")
    assert np.array_equal(safetensors.numpy.load_file(tmp_path / "o")["params['w']/sum"], [[0, 1, 4], [9, 16, 25]])


def test_own_rules_too(tmp_path):
    class Sign(fastrms.Optimizer):
        defaults = {"lr": 1e-4, "kind": "x", "flag": None}
        state_names = ("last",)

        def coefficients(step, lr, kind, flag):
            return {"lr": lr}

        def rule(param, grad, last, lr):
            return param - lr * grad, grad

    w = np.ones(7)
    optimizer = Sign(w, kind="y", backend="numpy")
    optimizer.step(np.arange(7.0))
    optimizer.save(tmp_path / "o")
    other = Sign(w.copy(), backend="numpy")
    other.load(tmp_path / "o")
    assert frozen(other) == frozen(optimizer) and other.groups[0]["kind"] == "y"


@pytest.fixture
def saved(tmp_path):
    """(optimizer, path of its file)"""
    params, gradients = problem()
    optimizer = fastrms.Adam(params, lr=Cosine(0.1, 50))
    optimizer.step(gradients[0])
    optimizer.save(tmp_path / "o")
    return optimizer, tmp_path / "o"


def refused(optimizer, path, words, error=ValueError):
    before = frozen(optimizer)
    with pytest.raises(error, match=words) as raised:
        optimizer.load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)
    assert frozen(optimizer) == before


def test_truncated_at_every_length(saved):
    optimizer, path = saved
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 97), *range(20), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refused(optimizer, path, "not a whole safetensors file")
    path.write_bytes(whole + b"x")
    refused(optimizer, path, "not a whole safetensors file")


@pytest.mark.parametrize("options", [{}, {"state_format": "bf16"}, {"state_format": "q8"}])
def test_one_flipped_bit_anywhere_is_found(tmp_path, options):
    path = tmp_path / "o"
    optimizer = fastrms.RMSProp({"é": np.ones((4, 3), np.float32)}, **options)
    optimizer.step({"é": np.ones((4, 3), np.float32)})
    optimizer.save(path)
    whole = path.read_bytes()
    before = frozen(optimizer)
    for bit in np.random.default_rng(0).permutation(8 * len(whole))[:600]:
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            optimizer.load(path)
    assert frozen(optimizer) == before
    path.write_bytes(whole)
    optimizer.load(path)


def test_damage_is_said_and_files_without_a_checksum_load(saved):
    optimizer, path = saved
    whole = path.read_bytes()
    with safetensors.safe_open(path, "np") as file:
        text = file.metadata()["fastrms"]
    rewritten(path, metadata={"fastrms": text.replace("0.999", "0.998")})
    refused(optimizer, path, "is damaged: its content has not the checksum that was saved with it; load another copy")
    rewritten(path, metadata={"fastrms": text.replace("sha256", "sha257")})
    refused(optimizer, path, "lacks its metadata")
    path.write_bytes(whole)
    rewritten(path, lambda header, tensors: None)
    before = frozen(optimizer)
    optimizer.load(path)
    assert frozen(optimizer) == before


def rewritten(path, change=None, metadata=None):
    """The file with its header and tensors, or its whole metadata, changed.  With a changed header it is of version 1,
    without a checksum."""
    with safetensors.safe_open(path, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["fastrms"]) if change else None
    if change:
        header.update(version=1)
        del header["sha256"]
        change(header, tensors)
    safetensors.numpy.save_file(tensors, path, metadata or {"fastrms": json.dumps(header)})


FIRST = "params['w']/exp_avg"


@pytest.mark.parametrize(
    "words, change",
    [
        ("version 3; this fastrms reads versions 1 and 2", lambda h, t: h.update(version=3)),
        ("version None", lambda h, t: h.update(version=None)),
        ("lacks its metadata", lambda h, t: h.pop("version")),
        ("lacks its metadata", lambda h, t: h.update(tensors=3)),
        ("does not hold the tensors", lambda h, t: t.pop(FIRST)),
        ("does not hold the tensors", lambda h, t: t.update(more=np.zeros(1))),
        ("does not hold the tensors", lambda h, t: h["tensors"].append(h["tensors"][0])),
        ("has dtype F16", lambda h, t: t.update({FIRST: np.zeros((3, 7), np.float16)})),
        ("must be an ndarray of float32, shape", lambda h, t: t.update({FIRST: np.zeros((7, 3), np.float32)})),
        ("must be an ndarray of float32, shape", lambda h, t: t.update({FIRST: np.zeros((3, 7))})),
        ("state_dict is of RMSProp, this is Adam", lambda h, t: h.update(optimizer="RMSProp")),
        ("beta1=2.0", lambda h, t: h["groups"][0].update(beta1=2.0)),
        ("lr is nan", lambda h, t: h["groups"][0].update(lr=float("nan"))),
        ("steps=-1", lambda h, t: h["tensors"][0].update(steps=-1)),
        ("KeyError", lambda h, t: h["groups"][0]["lr"].update(schedule="Other")),
        ("dialect='jax'", lambda h, t: h.update(dialect="jax")),
    ],
)
def test_files_that_do_not_fit(saved, words, change):
    optimizer, path = saved
    rewritten(path, change)
    refused(optimizer, path, words)


def test_foreign_files(saved):
    optimizer, path = saved
    for text in (None, "{", "[1]", "1" * 5000, "[" * 10**5):
        rewritten(path, metadata={"format": "pt"} if text is None else {"fastrms": text})
        refused(optimizer, path, "was not written by fastrms")
    path.write_bytes(pickle.dumps(optimizer.state_dict()))
    refused(optimizer, path, "not a whole safetensors file")


def test_wrong_optimizers(saved):
    _, path = saved
    params, _ = problem()
    refused(fastrms.RMSProp(params), path, "is of Adam, this is RMSProp")
    refused(fastrms.Adam(params, amsgrad=True), path, "has state")
    refused(fastrms.Adam(list(params.values())), path, r"has no params\[0\]")
    refused(fastrms.Adam({"w": params["w"]}), path, "has 4 tensors")
    refused(fastrms.Adam(params, lr=Plateau(0.1)), path, "lr is a Plateau here, the saved one is a Cosine")


def test_what_the_filesystem_refuses(saved, tmp_path):
    optimizer, path = saved
    refused(optimizer, tmp_path / "none", "No such file", FileNotFoundError)
    refused(optimizer, tmp_path, "Is a directory", IsADirectoryError)
    for target, error in ((tmp_path, IsADirectoryError), (tmp_path / "none" / "o", FileNotFoundError)):
        with pytest.raises(error):
            optimizer.save(target)
    assert os.listdir(tmp_path) == [path.name] and not list(tmp_path.parent.glob("*.tmp"))


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(saved, fails, monkeypatch):
    optimizer, path = saved
    before = path.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, fails, full)
    optimizer.step(problem(1)[1][0])
    with pytest.raises(OSError, match="No space"):
        optimizer.save(path)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_the_data_are_synced_before_the_rename_and_the_directory_after(saved, monkeypatch):
    optimizer, path = saved
    done = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd))[1])
    monkeypatch.setattr(files.os, "replace", lambda a, b: (done.append("replace"), replace(a, b))[1])
    optimizer.save(path)
    assert len(done) == 3 and done[0].endswith(".tmp") and done[1:] == ["replace", str(path.parent)]


def test_permissions_and_links(saved, tmp_path):
    """As a fresh file has them; a symbolic link stays, also a dangling one, and a hard link keeps the old file."""
    optimizer, path = saved
    path.unlink()
    before = os.umask(0o027)
    try:
        optimizer.save(path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    (tmp_path / "sub").mkdir()
    link, hard = tmp_path / "link", tmp_path / "hard"
    link.symlink_to("sub/target")
    hard.hardlink_to(path)
    old = hard.read_bytes()
    for k in range(2):
        optimizer.step(problem(k)[1][0])
        optimizer.save(link), optimizer.save(os.fsencode(path))
        assert link.is_symlink() and (tmp_path / "sub" / "target").read_bytes() == path.read_bytes() != old
    assert hard.read_bytes() == old


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o400])
def test_an_existing_file_keeps_its_permissions_and_its_group(saved, mode, monkeypatch):
    """Also while it is written: nobody reads the new file who could not read the old one."""
    optimizer, path = saved
    groups = [group for group in os.getgroups() if group != path.stat().st_gid]
    if os.getuid() == 0:
        groups.append(12345)
    for group in groups[-1:]:
        os.chown(path, -1, group)
    path.chmod(mode)
    before, seen, sync = path.stat(), [], os.fsync

    def synced(descriptor):
        seen.append(os.fstat(descriptor).st_mode & 0o777)
        sync(descriptor)

    def made(path, flags, permissions=0o777, **rest):
        assert not flags & os.O_CREAT or permissions == 0o600
        return opened(path, flags, permissions, **rest)

    opened = os.open
    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "open", made)
    if mode & 0o200 or os.getuid() == 0:
        optimizer.save(path)
        assert seen[0] == mode
    else:
        with pytest.raises(PermissionError):
            optimizer.save(path)
    after = path.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_group_that_cannot_be_kept_gives_no_other_group_its_rights(saved, monkeypatch):
    optimizer, path = saved
    path.chmod(0o664)
    monkeypatch.setattr(files.os, "fchown", lambda *arguments: (_ for _ in ()).throw(PermissionError(1, "not yours")))
    before, status = os.stat(path), os.stat

    def elsewhere(path, **rest):
        found = status(path, **rest)
        return os.stat_result((*found[:5], found.st_gid + 1, *found[6:])) if found.st_ino == before.st_ino else found

    monkeypatch.setattr(files.os, "stat", elsewhere)
    optimizer.save(path)
    assert path.stat().st_mode & 0o777 == 0o604


def test_what_is_no_regular_file_is_written_to(saved, tmp_path):
    """A FIFO, a device of ours where that may be made, and a file that has no name any more."""
    optimizer, path = saved
    fifo, device = tmp_path / "fifo", tmp_path / "null"
    os.mkfifo(fifo)
    got = []
    reader = threading.Thread(target=lambda: got.append(fifo.read_bytes()), daemon=True)
    reader.start()
    optimizer.save(fifo)
    reader.join(60)
    assert got == [path.read_bytes()] and stat.S_ISFIFO(fifo.stat().st_mode)
    with tempfile.TemporaryFile(dir=tmp_path) as nameless:
        optimizer.save(f"/proc/self/fd/{nameless.fileno()}")
        assert nameless.read() == path.read_bytes()
    if os.getuid() == 0:
        os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        optimizer.save(device)
        assert stat.S_ISCHR(device.stat().st_mode)
        device.unlink()
    assert sorted(os.listdir(tmp_path)) == ["fifo", path.name]


def test_an_empty_path_is_no_file(saved, tmp_path, monkeypatch):
    optimizer, path = saved
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(FileNotFoundError):
        optimizer.save("")
    assert sorted(os.listdir(tmp_path)) == ["here", path.name] and not os.listdir()


def test_folders_are_those_of_the_system(saved, tmp_path, monkeypatch):
    """Where there is no runs, runs/../notes is no file, as for open(); and no name ends with a slash."""
    optimizer, _ = saved
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "notes"
    notes.write_text("mine"), notes.chmod(0o600)
    for path in ("runs/../notes", "new/", "o/../notes", "notes/", "."):
        with pytest.raises(OSError, match="Errno") as wanted, open(path, "wb"):
            pass
        with pytest.raises(type(wanted.value)) as raised:
            optimizer.save(path)
        assert str(raised.value) == str(wanted.value)
    assert notes.read_text() == "mine" and sorted(os.listdir()) == ["notes", "o"]
    (tmp_path / "runs").mkdir()
    optimizer.save("runs/../notes")
    assert notes.stat().st_mode & 0o777 == 0o600 and notes.read_bytes() == (tmp_path / "o").read_bytes()


@pytest.mark.parametrize("count", [255, 243, 201])
def test_a_long_name(saved, tmp_path, count, monkeypatch):
    """The temporary file has a name that is short enough, and errors name the path that was given."""
    optimizer, path = saved
    name = "é" * (count // 2) + "x" * (count % 2)
    for _ in range(2):
        optimizer.save(tmp_path / name)
        assert (tmp_path / name).read_bytes() == path.read_bytes()
    with pytest.raises(OSError, match=r"File name too long: '.*é'"):
        optimizer.save(tmp_path / f"{name:x<255}é")
    (tmp_path / "link").symlink_to("none/target")
    with pytest.raises(FileNotFoundError) as raised:
        optimizer.save(tmp_path / "link")
    assert raised.value.filename == str(tmp_path / "link")
    assert sorted(os.listdir(tmp_path)) == sorted([name, "link", path.name])


def test_a_directory_that_cannot_be_synced_is_no_error(saved, monkeypatch):
    """As one that this user may write and not read: the file has been replaced."""
    optimizer, path = saved
    before, opened = path.read_bytes(), os.open

    def unreadable(path, flags, *rest, **names):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return opened(path, flags, *rest, **names)

    monkeypatch.setattr(files.os, "open", unreadable)
    optimizer.step(problem(1)[1][0])
    optimizer.save(path)
    assert path.read_bytes() != before and os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="no /proc")
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output_that_is_a_file_stays_this_file(tmp_path, path):
    (tmp_path / "link").symlink_to("/dev/stdout")
    code = f"""
import numpy as np, fastrms, os
fastrms.AdaGrad(np.ones(3)).save({path!r})
os.write(1, b"after")
"""
    with open(tmp_path / "out", "wb+") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True, cwd=tmp_path)
        assert os.path.samestat(os.fstat(out.fileno()), os.stat(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes().startswith(b"after") and (tmp_path / "out").stat().st_size > 100


def test_names_that_cannot_be_told_apart():
    class Key:
        def __repr__(self):
            return "key"

    with pytest.raises(ValueError, match=r"two keys of params read alike: params\[key\]"):
        fastrms.AdaGrad({Key(): np.ones(2), Key(): np.ones(2)})


def test_a_path_of_bytes(tmp_path):
    optimizer = fastrms.AdaGrad(np.ones(2))
    optimizer.save(os.fsencode(tmp_path / "o"))
    optimizer.load(os.fsencode(tmp_path / "o"))


def test_without_safetensors(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (fastrms.AdaGrad(np.ones(2)).save, fastrms.AdaGrad(np.ones(2)).load):
        with pytest.raises(ImportError, match=r"pip install safetensors"):
            call(tmp_path / "o")


@pytest.mark.skipif(len(BACKENDS) < 2, reason="one backend")
def test_files_move_between_backends(tmp_path):
    params, gradients = problem()
    results = []
    for backend in BACKENDS:
        mine = copied(params)
        optimizer = fastrms.RMSProp(mine, momentum=0.9, backend=backend)
        if results:
            optimizer.load(tmp_path / "o")
        else:
            optimizer.step(copied(gradients[0]))
            params = copied(mine)
            optimizer.save(tmp_path / "o")
        optimizer.step(gradients[1])
        results.append([bits(x) for x in mine.values()])
    assert all(np.array_equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))


KILLED = """
    import glob, mmap, os, random, signal, sys, time
    import numpy as np, fastrms
    from fastrms import files

    path, kills, straight = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "straight"
    if straight:
        def write(path, data):
            with open(path, "wb") as file:
                file.write(data)
        files.save = write
    optimizer = fastrms.AdaGrad(np.zeros(1 << 17, np.float32), backend="numpy")
    total, grad = optimizer.state["sum"], np.zeros(1 << 17, np.float32)

    def save():                    # after n steps every element of the state is n, and so is the step count
        optimizer.step(grad)
        total[:] = optimizer.steps
        optimizer.save(path)

    done = mmap.mmap(-1, 8)        # shared with the child: the last file that it has finished
    save(), optimizer.load(path)
    random.seed(1)
    parts = 0
    for kill in range(kills):
        done[:] = optimizer.steps.to_bytes(8, "little")
        child = os.fork()
        if child == 0:
            while True:
                save()
                done[:] = optimizer.steps.to_bytes(8, "little")
        time.sleep(random.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        optimizer.load(path)
        finished = int.from_bytes(done[:], "little")
        assert optimizer.steps in (finished, finished + 1), (optimizer.steps, finished)
        assert (total == optimizer.steps).all()
        for part in glob.glob(path + ".*.tmp"):
            os.remove(part)
            parts += 1
    print(parts)
"""


def killed(path, way, kills=200):
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(KILLED), str(path), str(kills), way]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_killed_writer_leaves_the_old_or_the_new_file(tmp_path):
    """SIGKILL at 200 random moments; parts of files show that some hit the write."""
    run = killed(tmp_path / "o", "renamed")
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0


def test_a_straight_write_would_not_survive_that(tmp_path):
    """The test above bites: written straight to its path, the file is soon found torn."""
    run = killed(tmp_path / "o", "straight")
    assert run.returncode == 1 and "not a whole safetensors file" in run.stderr, run.stdout + run.stderr


def test_a_flat_buffer_resumes(tmp_path):
    """With groups by pattern, whose patterns are in the file."""
    shapes, groups = {"w": (2, 3), "w.bias": (3,)}, {"*.bias": {"lr": 0.5}}
    flats = [fastrms.FlatBuffer(shapes) for _ in range(2)]
    optimizers = [fastrms.RMSProp(flat, momentum=0.9, groups=groups) for flat in flats]
    for flat in flats:
        flat.grad[...] = np.arange(flat.grad.size)
    optimizers[0].step(flats[0].grad)
    optimizers[0].save(tmp_path / "flat")
    flats[1].data[...] = flats[0].data
    optimizers[1].load(tmp_path / "flat")
    for optimizer, flat in zip(optimizers, flats, strict=True):
        optimizer.step(flat.grad)
    assert np.array_equal(flats[0].data, flats[1].data) and optimizers[1].steps == 2
    with pytest.raises(ValueError, match="patterns"):
        fastrms.RMSProp(flats[0], momentum=0.9, groups={"w": {}}).load(tmp_path / "flat")
