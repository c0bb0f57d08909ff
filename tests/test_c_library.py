"""csrc/ without Python: the static library, the coefficients that C computes, the header, and the trainer written in C."""

import ctypes
import importlib.util
import math
import random
import re
import shutil
import subprocess

import numpy as np
import pytest
from conftest import DTYPES, FAMILIES, c, recipe_of
from test_build import COMPILER, ROOT, check_kernels, instructions, needs_c

import fastrms
from fastrms import recipes

MAKE = shutil.which("make")
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
TRAINER = ROOT / "examples" / "trainer_c"
needs_make = pytest.mark.skipif(COMPILER is None or MAKE is None, reason="no C compiler or no make here")

ONLY_FOR_THE_STATE = {"initial_value"}  # no coefficient
WORDS = {None: 0, "corrected": 2, "folded": 3, "dozat": 4}  # those of fastrms_decl.h


# the coefficients


def in_c(hyper):
    """Hyper-parameters of Python as a fastrms_hyper."""
    made = c.ffi.new("fastrms_hyper *")
    for name, value in hyper.items():
        if name not in ONLY_FOR_THE_STATE:
            setattr(made, name, WORDS.get(value, value))
    return made


def c_recipe(family, hyper, dtype):
    """(the fastrms_recipe that C computes, as bytes; what it refuses, or None); the recipe must be as it was then."""
    recipe = c.ffi.new("fastrms_recipe *")
    c.ffi.buffer(recipe)[:] = before = b"\x55" * c.ffi.sizeof("fastrms_recipe")
    function = getattr(c.lib, f"fastrms_{recipe_of(FAMILIES[family])}_recipe")
    refused = function(recipe, dtype.itemsize, in_c(hyper))
    assert not refused or bytes(c.ffi.buffer(recipe)) == before
    return bytes(c.ffi.buffer(recipe)), c.ffi.string(refused).decode() if refused else None


def python_recipe(family, hyper, dtype):
    """(the same as Python computes it, the error it raises or None)"""
    make = FAMILIES[family]
    try:
        recipe = make.checked_recipe(make.at_step(make.resolve(None, hyper)), dtype)
    except ValueError as error:
        return None, str(error)
    filled = c.ffi.new("fastrms_recipe *")
    c.fill_recipe(filled, recipe)
    return bytes(c.ffi.buffer(filled)), None


def magnitude(rng):
    usual = [0.0, 1e-300, 1e-46, 1e-30, 1e-8, 1e-3, 1.0, 1e20, 1e39, 10 ** rng.uniform(-12, 3)]
    return -1.0 if rng.random() < 0.01 else rng.choice(usual)


def rate(rng):
    return rng.choice([0.0, 0.5, 0.9, 0.99, 0.999, 1 - 1e-7, 1 - 1e-9, 1 - 2**-53, 1e-46, rng.random()])


VALUES = {
    "lr": magnitude, "eps": magnitude, "eps_root": magnitude, "lr_decay": magnitude, "weight_decay": magnitude,
    "rho": rate, "beta1": rate, "beta2": rate, "momentum": lambda rng: rng.choice([0.0, rate(rng)]),
    "clip_value": lambda rng: rng.choice([None, None, 1.0, 1e-46, 1e39, 0.1 + rng.random()]),
    "eta_minus": lambda rng: rng.choice([0.5, 1 - 1e-9, rng.random() or 0.5]),
    "eta_plus": lambda rng: rng.choice([1.2, 1 + 1e-9, 1e39, 1 + rng.random()]),
    "step_min": magnitude, "step_max": magnitude,
    "bias_correction": lambda rng: rng.choice([False, "corrected", "folded"]),
    "amsgrad": lambda rng: rng.choice([False, True, "corrected"]),
}  # fmt: skip


def random_hyper(family, rng):
    """Some hyper-parameters away from their defaults: those of a few, or of all."""
    flags = {"nesterov": [False, "dozat", "folded"] if family.startswith("adam") else [False, True]}
    hyper, share = {}, rng.choice([0.2, 0.3, 1.0])
    for name, default in FAMILIES[family].defaults.items():
        if name in ONLY_FOR_THE_STATE or rng.random() > share:
            hyper[name] = default
        elif name in VALUES:
            hyper[name] = VALUES[name](rng)
        else:
            assert isinstance(default, bool), f"VALUES has nothing for {name}"
            hyper[name] = rng.choice(flags.get(name, [False, True]))
    return hyper


@needs_c
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_c_computes_the_recipes_of_python(family, dtype):
    """The whole struct, byte by byte, for every rule in both forms; and C refuses what Python refuses."""
    rng, seen, refusals = random.Random(f"{family} {dtype}"), set(), 0
    for _ in range(1500):
        hyper = random_hyper(family, rng)
        want, error = python_recipe(family, hyper, dtype)
        got, refused = c_recipe(family, hyper, dtype)
        assert (refused is None) == (error is None), (hyper, refused, error)
        if error is None:
            assert got == want, hyper
            recipe = c.ffi.from_buffer("fastrms_recipe *", bytearray(got))
            seen.add((recipe.rule, recipe.general))
        refusals += error is not None
    count = len(recipes.FAMILIES[recipe_of(FAMILIES[family])].rules)
    assert len(seen) == 2 * count and 0 < refusals < 1400, (seen, refusals)


@needs_c
@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_are_those_of_python(family):
    defaults = getattr(c.lib, f"fastrms_{family}_defaults")
    assert bytes(c.ffi.buffer(c.ffi.addressof(defaults))) == bytes(c.ffi.buffer(in_c(FAMILIES[family].defaults)))


@needs_c
@pytest.mark.parametrize("family, wrong", [
    *[(f, {name: value}) for f in FAMILIES for name in ("lr", "clip_value") for value in (-1.0, math.nan, math.inf)],
    *[("rmsprop", {name: value}) for name in ("rho", "momentum") for value in (-0.1, 1.0, math.nan, 1 - 1e-9)],
    *[("adam", {name: value}) for name in ("beta1", "beta2") for value in (-0.1, 1.0, math.nan, 1 - 1e-9)],
    *[(f, {"weight_decay": -1.0}) for f in ("rmsprop", "adagrad", "adam")],
    *[("rprop", wrong) for wrong in ({"eta_minus": 1.0}, {"eta_minus": 0.0}, {"eta_plus": 1.0}, {"step_min": 51.0})],
    ("rprop", {"step_max": math.inf}), ("rmsprop", {"eps": 0.0}), ("rmsprop", {"eps_root": -1.0}),
    ("rmsprop", {"nesterov": True}), ("adam", {"eps": 0.0}), ("adam", {"lr": 1e39}),
    ("adagrad", {"lr_decay": -1.0}), ("adagrad", {"eps": math.nan}),
])  # fmt: skip
def test_a_wrong_hyper_parameter_is_named(family, wrong):
    """As in Python, whose sentence has the same name."""
    hyper = {**FAMILIES[family].defaults, **wrong}
    _, refused = c_recipe(family, hyper, np.dtype(np.float32))
    _, error = python_recipe(family, hyper, np.dtype(np.float32))
    assert [refused] == list(wrong) and refused in error


@needs_c
def test_words_and_sizes_that_are_none_are_refused():
    for family, name, value in [("rmsprop", "bias_correction", 1), ("rmsprop", "nesterov", 2), ("adam", "nesterov", 1),
                                ("adam", "amsgrad", 3), ("adam", "bias_correction", -1)]:  # fmt: skip
        hyper = {**FAMILIES[family].defaults, "momentum": 0.9} if family == "rmsprop" else dict(FAMILIES[family].defaults)
        assert c_recipe(family, {**hyper, name: value}, DTYPES[0])[1] == name
    assert c.ffi.string(c.lib.fastrms_rprop_recipe(c.ffi.NULL, 2, c.ffi.NULL)) == b"itemsize"


@needs_c
@pytest.mark.parametrize("step", [0, -1, -(2**63), 2**62 + 1, 2**63 - 1])
def test_a_step_that_cannot_be_has_a_status_and_changes_nothing(step):
    recipe, buffers = c.ffi.new("fastrms_recipe *"), [np.full(3, value) for value in (1.0, 2.0, 0.5, 0.25)]
    assert c.lib.fastrms_adam_recipe(recipe, 8, c.ffi.addressof(c.lib.fastrms_adam_defaults)) == c.ffi.NULL
    pointers = [c.ffi.from_buffer(buffer) for buffer in buffers] + [c.ffi.NULL]
    assert c.lib.fastrms_update(recipe, 3, step, 1.0, *pointers) == c.lib.FASTRMS_STEP
    assert [buffer[0] for buffer in buffers] == [1.0, 2.0, 0.5, 0.25]
    assert c.lib.fastrms_update(recipe, 3, 2**62, 1.0, *pointers) == c.lib.FASTRMS_OK
    assert np.isfinite(buffers[0]).all() and buffers[0][0] != 1


# the library


def run(*command, **options):
    """A command that must succeed; its standard output."""
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make(directory, into, *settings, **options):
    return run(MAKE, "-j2", "-C", directory, f"BUILD={into}", *settings, **options)


@pytest.fixture(scope="module")
def tools(tmp_path_factory):
    """A directory with all that `make -C csrc` needs, compilers beside it, and no Python."""
    found = tmp_path_factory.mktemp("tools")
    for name in ("make", "ar", "as", "ld", "mkdir", "sed", "sh", "cc", *COMPILERS):
        (found / name).symlink_to(shutil.which(name))
    return found


@pytest.fixture(scope="module", params=COMPILERS)
def library(request, tools, tmp_path_factory):
    """(the directory of the static library, as one command makes it where there is no Python; the compiler)"""
    into = tmp_path_factory.mktemp(request.param)
    make(ROOT / "csrc", into, f"CC={request.param}", env={"PATH": str(tools)})
    return into, request.param


SANITIZERS = "address,undefined"


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """The directory of the library and the trainer with sanitizers."""
    into = tmp_path_factory.mktemp("sanitized")
    make(TRAINER, into, f"SANITIZE={SANITIZERS}")
    return into / SANITIZERS


def readme_program():
    return next(re.finditer(r"```c\n(.*?)```", (ROOT / "docs" / "c.md").read_text(), re.S))[1]


def want():
    """What the program of docs/c.md prints, from Python."""
    param = np.array([1, 2, 3], np.float32)
    optimizer = fastrms.RMSProp(param, lr=0.02)
    for _ in range(100):
        optimizer.step(param * 2)
    return " ".join(f"{x:.9g}" for x in param) + "\n"


@needs_make
def test_one_command_builds_the_kernels_without_python(library):
    check_kernels(instructions(library[0] / "libfastrms.a"))


@needs_make
@pytest.mark.parametrize("language", ["c", "c++"])
def test_the_readmes_program_links_and_has_pythons_bits(library, language, tmp_path):
    """As it stands, in C and in C++, with all warnings."""
    into, compiler = library
    compiler = compiler if language == "c" else {"gcc": "g++", "clang": "clang++"}[compiler]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    (tmp_path / "program.c").write_text(readme_program())
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", f"-I{fastrms.get_include()}", "-x", language]
    linked = ["-x", "none", into / "libfastrms.a", "-lm", "-pthread"]
    run(compiler, *strict, tmp_path / "program.c", *linked, "-o", tmp_path / "program")
    assert run(tmp_path / "program") == want()


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_the_header_alone_has_null(tmp_path):
    """The lines of README.md say NULL, and include nothing but fastrms.h."""
    (tmp_path / "null.c").write_text("#include <fastrms.h>\nvoid *nothing(void);\nvoid *nothing(void) { return NULL; }\n")
    run(COMPILER, "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", "-c", tmp_path / "null.c", "-o", tmp_path / "null.o")


@needs_c
@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_c_step_from_c(tmp_path):
    """A C function that is given opt.c_step, with the types of fastrms.h."""
    (tmp_path / "twice.c").write_text("""#include <fastrms.h>
int twice(int (*step)(fastrms_plan *), fastrms_plan *plan) { return step(plan) || step(plan) || plan->steps != 2; }
""")
    run(COMPILER, "-shared", "-fPIC", f"-I{fastrms.get_include()}", tmp_path / "twice.c", "-o", tmp_path / "twice.so")
    twice = ctypes.CDLL(str(tmp_path / "twice.so")).twice
    param, same, grad = np.ones(7, np.float32), np.ones(7, np.float32), np.full(7, 0.3, np.float32)
    optimizer, other = fastrms.Adam(param, backend="c"), fastrms.Adam(same, backend="c")
    optimizer.bind(grad)
    assert twice(*map(ctypes.c_void_p, optimizer.c_step)) == 0
    for _ in range(2):
        other.step(grad)
    assert np.array_equal(param, same) and optimizer.steps == 2


@needs_c
def test_a_plan_made_by_init_keeps_its_grad_scale():
    """fastrms_change makes one step with another grad_scale; before and after, fastrms_step has that of the plan."""
    ffi, lib = c.ffi, c.lib
    param, grad, total = (np.full(3, value, np.float32) for value in (0, 1, 0))
    param_at, grad_at, total_at = map(ffi.from_buffer, (param, grad, total))
    recipe = ffi.new("fastrms_recipe *")
    assert not lib.fastrms_adagrad_recipe(recipe, 4, ffi.addressof(lib.fastrms_adagrad_defaults))
    tensor = ffi.new("fastrms_tensor[]", [{"size": 3, "param": param_at, "state": [total_at]}])
    plan, grads, scratch = ffi.new("fastrms_plan *"), ffi.new("void *[]", 1), ffi.new("double[]", 1000)
    assert lib.fastrms_scratch_bytes(1, tensor) <= ffi.sizeof(scratch)
    lib.fastrms_plan_init(plan, 1, tensor, 1, recipe, grads, scratch)
    assert lib.fastrms_step(plan) == lib.fastrms_step_held(plan, 0) == lib.FASTRMS_NOT_HELD
    assert plan.steps == 0 and (param == 0).all()
    grads[0], plan.held, plan.grad_scale = grad_at, 1, 0.5
    assert lib.fastrms_step(plan) == lib.FASTRMS_OK and (total == 0.25).all()
    assert lib.fastrms_change(plan, ffi.NULL, ffi.NULL, ffi.NULL, 0, 1, 2.0, -1.0, ffi.NULL) == lib.FASTRMS_OK
    assert (total == 4.25).all()
    assert lib.fastrms_step(plan) == lib.FASTRMS_OK and (total == 4.5).all() and plan.steps == tensor[0].steps == 3


# the trainer


def load(name):
    spec = importlib.util.spec_from_file_location(name, TRAINER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_trainer(program, tmp_path):
    """It learns, without a word of error; Python makes the same steps to the same bits."""
    data, weights, steps = (tmp_path / name for name in ("digits.csv", "weights.bin", "steps.bin"))
    load("export_digits").main(data)
    done = subprocess.run([program, data, weights, steps], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    lines, same = done.stdout.splitlines(), load("same")
    assert len(lines) == 20 and float(re.search(r"accuracy (\S+) %", lines[-1])[1]) >= 95
    assert same.main(weights, steps)
    changed = np.fromfile(steps, np.float32)
    changed[-1] += 1
    changed.tofile(steps)
    assert not same.main(weights, steps)


@needs_make
def test_the_trainer_learns_and_has_pythons_bits(library, tmp_path):
    into, compiler = library
    make(TRAINER, into, f"CC={compiler}")
    check_trainer(into / "trainer", tmp_path)


@needs_make
def test_the_trainer_under_sanitizers(sanitized, tmp_path):
    check_trainer(sanitized / "trainer", tmp_path)


@needs_make
def test_storage_formats_under_sanitizers(sanitized, tmp_path):
    """Buffers that a storage lacks are not moved along, no buffer is read behind its end, and all formats are known."""
    options = ["-Wall", "-g", f"-fsanitize={SANITIZERS}", "-fno-sanitize-recover=all", f"-I{ROOT / 'csrc'}"]
    linked = [sanitized / "libfastrms.a", "-lm", "-pthread"]
    run(COMPILER, *options, ROOT / "tests" / "c" / "formats.c", *linked, "-o", tmp_path / "formats")
    assert run(tmp_path / "formats") == "0\n"


@needs_make
def test_the_trainer_refuses_what_it_cannot_read(library, tmp_path):
    into, compiler = library
    make(TRAINER, into, f"CC={compiler}")
    for text, words in [("1,2\n", "a line is not a digit and 64 pixels"), ("", "too few images"), (None, "cannot open")]:
        data = tmp_path / "data.csv"
        data.unlink(missing_ok=True) if text is None else data.write_text(text)
        done = subprocess.run([into / "trainer", data, tmp_path / "weights.bin"], capture_output=True, text=True)
        assert done.returncode == 1 and words in done.stderr and not (tmp_path / "weights.bin").exists()


@needs_make
def test_the_sanitizers_bite(sanitized, tmp_path):
    """A state one number too short is reported from within the library."""
    program = readme_program().replace("square_avg[3]", "square_avg[2]")
    assert program != readme_program()
    (tmp_path / "program.c").write_text(program)
    options = ["-w", "-g", f"-fsanitize={SANITIZERS}", f"-I{ROOT / 'csrc'}"]
    linked = [sanitized / "libfastrms.a", "-lm", "-pthread"]
    run(COMPILER, *options, tmp_path / "program.c", *linked, "-o", tmp_path / "program")
    done = subprocess.run([tmp_path / "program"], capture_output=True, text=True)
    assert done.returncode != 0 and "AddressSanitizer" in done.stderr and "kernels.inc" in done.stderr
