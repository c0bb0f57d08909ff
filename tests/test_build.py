"""The build: what the compiler made of the kernels, the flags that make it do so, wheels, and builds without C."""

import collections
import inspect
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import types
import venv
import zipfile
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
from conftest import BACKENDS, backends, c

import fastrms
from fastrms import rules

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("cc")
MACHINE = platform.machine()
X86 = MACHINE == "x86_64"
needs_c = pytest.mark.skipif(c.lib is None, reason="this installation was built without C on purpose (FASTRMS_NO_EXT=1)")


def addressed(binary, objdump="objdump"):
    """The instructions of every function of a binary: name -> list of (address, mnemonic and registers)."""
    listing = subprocess.run(
        [objdump, "-d", "--no-show-raw-insn", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    functions, current = collections.defaultdict(list), None
    for line in listing.splitlines():
        if match := re.match(r"[0-9a-f]+ <(\w+)>:", line):
            current = match[1]
        elif current and re.match(r" *[0-9a-f]+:\t", line):
            address, text = line.split("\t", 1)
            functions[current].append((int(address.strip(" :"), 16), text))
    return functions


def instructions(binary, objdump="objdump"):
    """Mnemonics and registers of every function of a binary: name -> list of lines."""
    bodies = addressed(binary, objdump)
    return collections.defaultdict(list, {name: [text for _, text in body] for name, body in bodies.items()})


def tiers():
    """The instruction sets that csrc/internal.h lists for this machine."""
    text = (ROOT / "csrc" / "internal.h").read_text()
    return re.findall(r"^    X\((\w+),", text, re.M) if X86 else ["neon" if MACHINE in ("aarch64", "arm64") else "baseline"]


@needs_c
def test_the_build_has_the_tiers_of_the_sources():
    """It is stale otherwise: build the C extension again."""
    assert [c.ffi.string(c.lib.fastrms_isa_name(k)).decode() for k in range(c.lib.fastrms_isa_count())] == tiers()


def kernel_names():
    return [
        (f"{rule}_{real}_{form}_{isa}", rule, real, isa)
        for rule in rules.RULES for real in ("float", "double") for form in ("neutral", "general") for isa in tiers()
    ]  # fmt: skip


PACKED = {  # of each tier on x86-64
    "baseline": r"^v?{0}{1}\s.*%xmm",
    "avx2": r"^v{0}{1}\s.*%ymm",
    "avx512": r"^v{0}{1}\s.*%zmm",
    "avx512fma": r"^v{0}{1}\s.*%zmm",
}
ROOTS = {("avx512fma", "float"): (5, 1), ("avx512fma", "double"): (8, 1)}  # fused multiply-adds and estimates of a root


def packed(operation, real, isa):
    """Pattern of the packed instruction of full width."""
    if not X86:
        return rf"^f{operation}\s+v\d+\.{'4s' if real == 'float' else '2d'}"
    return PACKED[isa].format(operation, "ps" if real == "float" else "pd")


def operations(rule):
    """What must be packed in the kernels of a rule: roots and quotients, or products where it has neither."""
    text = inspect.getsource(rules.RULES[rule])
    return [name for name, sign in (("sqrt", "sqrt("), ("div", " / ")) if sign in text] or ["mul"]


def check_kernels(functions):
    """Every kernel of every tier: packed sqrt and div (multiplies where the rule has neither), and no fused multiply-adds or
    estimates but those of one line of roots."""
    for name, rule, real, isa in kernel_names():
        body = functions[name]
        assert body, f"{name} is not in the binary"
        for operation in operations(rule):
            assert any(re.search(packed(operation, real, isa), line) for line in body), f"{name} has no packed {operation}"
        fused = sum(bool(re.match(r"v?fn?m(add|sub|la\b|ls\b)", line)) for line in body)
        estimates = sum(bool(re.match(r"v?(rsqrt|rcp|frsqrte|frecpe)", line)) for line in body)
        allowed = (0, 0) if rule == "rprop" else ROOTS.get((isa, real), (0, 0))
        assert fused <= allowed[0], f"{name} contracts to FMA: {fused} fused multiply-adds, {allowed[0]} are of roots.h"
        assert (fused, estimates) == allowed, f"{name} has {fused} fused multiply-adds and {estimates} estimates"


@needs_c
def test_the_built_kernels_are_vectorised_and_exact():
    from fastrms import _core

    check_kernels(instructions(_core.__file__))


def flags():
    return [word for line in (ROOT / "csrc" / "flags").read_text().splitlines() for word in line.partition("#")[0].split()]


def compiled(tmp_path, options, compiler=COMPILER):
    """kernels.c compiled with options, disassembled; what the compiler says where it refuses."""
    target = tmp_path / "kernels.o"
    run = subprocess.run(
        [compiler, *options, "-fPIC", "-c", str(ROOT / "csrc" / "kernels.c"), "-o", str(target)],
        capture_output=True,
        text=True,
    )
    return instructions(target) if run.returncode == 0 else run.stderr


VERSIONED = [f"{name}-{version}" for name in ("gcc", "clang") for version in range(11, 30)]


@pytest.mark.parametrize("compiler", [name for name in VERSIONED if shutil.which(name)])
def test_every_compiler_here_vectorises_the_kernels(tmp_path, compiler):
    check_kernels(compiled(tmp_path, flags(), compiler))


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_a_users_fast_math_does_not_reach_the_kernels(tmp_path):
    """CFLAGS come before our flags; ours switch -Ofast off again, in an order that keeps the loops vectorised."""
    check_kernels(compiled(tmp_path, ["-Ofast", "-mfma", *flags()] if X86 else ["-Ofast", *flags()]))


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_fast_math_is_an_error_in_the_source(tmp_path):
    assert "build without -ffast-math" in compiled(tmp_path, [*flags(), "-ffast-math"])


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
@pytest.mark.parametrize("without", ["-O3", "-fno-math-errno"])
def test_the_check_of_the_kernels_bites(tmp_path, without):
    """Without one of these flags the loops are not vectorised, and check_kernels says so."""
    options = [flag for flag in flags() if flag != without] + (["-O1"] if without == "-O3" else [])
    with pytest.raises(AssertionError, match="no packed"):
        check_kernels(compiled(tmp_path, options))


@pytest.mark.skipif(COMPILER is None or not X86, reason="no C compiler for x86-64 here")
def test_contraction_would_be_seen(tmp_path):
    options = [flag for flag in flags() if flag != "-ffp-contract=off"] + ["-mfma"]
    with pytest.raises(AssertionError, match="FMA"):
        check_kernels(compiled(tmp_path, options))


@needs_c
def test_no_second_runtime_is_linked():
    from fastrms import _core

    linked = subprocess.run(["ldd", _core.__file__], capture_output=True, text=True, check=True).stdout
    assert "gomp" not in linked and "omp" not in linked.replace("compiler", "")


def build(kind, source, out, **environment):
    """python -m build in a copy of the sources."""
    command = [sys.executable, "-m", "build", *kind, "--outdir", str(out), str(source)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A clean copy of the tracked kind of files: no build products."""
    target = tmp_path_factory.mktemp("sources") / "fastrms"
    ignore = shutil.ignore_patterns(
        ".git", ".venv", "*.so", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, target, ignore=ignore)
    return target


def environment_with(wheel, tmp_path):
    """The Python of a new virtual environment that holds the wheel, beside the libraries of this one but not its fastrms."""
    venv.create(tmp_path / "venv", symlinks=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))  # its own .pth files, such as ours, are not read
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return tmp_path / "venv" / "bin" / "python", site / "fastrms"


def run_tests_with(wheel, tests, tmp_path):
    """The named tests of this checkout against an installed wheel, from another directory."""
    python, package = environment_with(wheel, tmp_path)
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *[str(ROOT / "tests" / t) for t in tests]]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("FASTRMS_", "PYTHONPATH"))}
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stdout + run.stderr
    assert str(package / "__init__.py") in run.stdout  # the header names what was tested
    return python, run.stdout


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here")
def test_sdist_to_wheel_to_tests(sources, tmp_path):
    """python -m build makes the wheel out of the sdist; the wheel is one abi3 file and passes tests elsewhere."""
    run = build([], sources, tmp_path / "dist")
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    files = {"_core.abi3.so", "__main__.py", "rules.py", "backends/c.py", "backends/numpy.py"}
    assert {f"fastrms/{name}" for name in files} <= set(names)
    assert {"fastrms/py.typed", "fastrms/__init__.pyi", "fastrms/numba.pyi"} <= set(names)
    (metadata,) = (n for n in names if n.endswith(".dist-info/METADATA"))
    licence = zipfile.ZipFile(wheel).read(f"{metadata.rpartition('/')[0]}/licenses/LICENSE")
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert b"\nLicense-Expression: MIT\n" in zipfile.ZipFile(wheel).read(metadata)
    assert not [n for n in names if n.startswith(("tests", "bench", "csrc", "examples"))]
    assert {n for n in names if n.endswith(".h")} == {"fastrms/include/fastrms.h", "fastrms/include/fastrms_decl.h"}
    python, out = run_tests_with(wheel, ["test_optimizers.py", "test_numerics.py"], tmp_path)
    assert re.search(r"\d+ passed", out)
    check_header(python, tmp_path)
    check_sdist(tmp_path / "dist")


ABIS = [(0, (3, 10), "cp310"), (0, (3, 15), "cp310"), (1, (3, 14), None), (1, (3, 15), "cp315")]


@pytest.mark.parametrize(("free_threaded", "version", "tag"), ABIS)
def test_the_stable_abi_of_a_wheel(monkeypatch, sources, free_threaded, version, tag):
    """abi3 from 3.10 on; free-threaded CPython 3.14 has none, and 3.15 has abi3t, which setuptools adds to the name."""
    asked = {}
    monkeypatch.chdir(sources)
    monkeypatch.delenv("FASTRMS_NO_EXT", raising=False)
    monkeypatch.setattr(sys, "version_info", version)
    monkeypatch.setattr(sysconfig, "get_config_var", {"Py_GIL_DISABLED": free_threaded}.get)
    monkeypatch.setitem(sys.modules, "setuptools", types.SimpleNamespace(setup=asked.update))
    exec(compile((ROOT / "setup.py").read_text(), "setup.py", "exec"), {})
    assert asked["options"] == ({"bdist_wheel": {"py_limited_api": tag}} if tag else {})


def test_the_headers_of_the_package_are_those_of_the_sources():
    """Files, not links, which a clone on Windows does not keep; copies as old as the last build."""
    for name in ("fastrms.h", "fastrms_decl.h"):
        header = Path(fastrms.get_include(), name)
        assert not header.is_symlink() and header.read_bytes() == (ROOT / "csrc" / name).read_bytes()


def check_sdist(dist):
    """All that C needs is in it, and nothing that was built."""
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert archive.extractfile(f"{sdist.name.removesuffix('.tar.gz')}/LICENSE").read() == (ROOT / "LICENSE").read_bytes()
        names = {name.partition("/")[2] for name in archive.getnames()}
    of_c = ("Makefile", "flags", "fingerprint.py", "recipes.c", "fastrms_decl.h", "kernels.inc")
    assert {f"csrc/{name}" for name in of_c} <= names
    assert {"LICENSE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md"} <= names
    assert {"README.md", "docs/performance.md"} <= names
    assert {"examples/trainer_c/" + name for name in ("Makefile", "trainer.c", "export_digits.py", "same.py")} <= names
    assert not [name for name in names if name.endswith((".o", ".a", ".so")) or "/build/" in name]


def check_header(python, tmp_path):
    """The installed wheel's fastrms.h is found by get_include() and compiles, with nothing of the sources in reach."""
    program = "import fastrms; print(fastrms.get_include())"
    include = subprocess.run(
        [python, "-E", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert include.startswith(str(tmp_path)) and not Path(include, "fastrms.h").is_symlink()
    text = "#include <fastrms.h>\nint main(void) { return sizeof(fastrms_plan) < 100; }\n"
    (tmp_path / "program.c").write_text(text)
    command = [COMPILER, f"-I{include}", "program.c", "-o", "program"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([tmp_path / "program"], check=True)


def test_built_without_c_on_purpose(sources, tmp_path):
    """FASTRMS_NO_EXT=1: a pure wheel that runs on NumPy, or Numba where that is installed, and says so."""
    run = build(["--wheel"], sources, tmp_path / "dist", FASTRMS_NO_EXT="1")
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert "-py3-none-any" in wheel.name
    python, out = run_tests_with(wheel, ["test_optimizers.py", "test_numerics.py", "test_arrays.py"], tmp_path)
    left = [name for name in BACKENDS if name != "c"]
    assert f"{len(left)} tiers run ({', '.join(left)})" in out
    question = "import fastrms; assert fastrms.isa() is None; fastrms.RMSProp(__import__('numpy').ones(3), backend='c')"
    answer = subprocess.run([python, "-E", "-c", question], cwd=tmp_path, capture_output=True, text=True)
    assert "backend='c' is not available: fastrms was built without its C extension" in answer.stderr


def test_a_missing_compiler_is_fatal_and_named(sources, tmp_path):
    run = build(["--wheel"], sources, tmp_path / "dist", CC="no-such-compiler")
    assert run.returncode != 0
    assert "no-such-compiler" in run.stdout + run.stderr and "FASTRMS_NO_EXT=1" in run.stdout + run.stderr
    assert not list((tmp_path / "dist").glob("*.whl")) if (tmp_path / "dist").exists() else True


def question(code, **environment):
    """Run code in a fresh process; its standard output, or its last line of error."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment})
    return run.stdout.strip() if run.returncode == 0 else run.stderr.strip().splitlines()[-1]


@needs_c
def test_the_instruction_set_can_be_forced():
    for name in c.isas():
        assert question("import fastrms; print(fastrms.isa())", FASTRMS_ISA=name) == name
    assert "FASTRMS_ISA='sse9' is not in this build" in question("import fastrms", FASTRMS_ISA="sse9")


@needs_c
def test_two_texts_that_differ_are_refused():
    """A stale extension beside an edited rules.py must not run."""
    code = "import fastrms.rules as r; r.RULES['adagrad'] = r.RULES['rprop']; import fastrms.backends.c"
    package = str(Path(c.__file__).parent.parent)
    empty = f"import sys, types; sys.modules['fastrms'] = p = types.ModuleType('fastrms'); p.__path__ = [{package!r}];"
    code = empty + code
    assert "differ in the rule 'adagrad': rebuild" in question(code)


def test_import_is_light():
    """import fastrms brings neither numba nor torch nor matplotlib, and no thread."""
    code = (
        "import sys, numpy; before = set(sys.modules); import fastrms, threading;"
        "heavy = {'numba', 'torch', 'matplotlib', 'rich', 'scipy', 'jax', 'safetensors'};"
        "print(sorted(heavy & set(sys.modules)), threading.active_count())"
    )
    assert question(code) == "[] 1"


def test_show_config_and_available_backends():
    out = question("import fastrms; fastrms.show_config(); print(fastrms.available_backends())")
    for words in ("fastrms", "numpy", "backends", "auto", "isa", "python", "machine", "threads"):
        assert words in out
    assert repr(BACKENDS) in out and BACKENDS[-1] == "numpy" and ("c" in BACKENDS) == bool(c.lib)


def test_an_import_without_the_extension_says_so():
    """No warning, but a line where people look: a source tree in which nothing was built runs on another backend."""
    code = (
        "import sys, warnings; warnings.simplefilter('error'); sys.modules['fastrms._core'] = None;"
        "import numpy as np, fastrms; fastrms.show_config(); optimizer = fastrms.RMSProp(np.ones(3));"
        "print(optimizer.report()); print(fastrms.RMSProp(np.ones(3), backend='c'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    config, report = run.stdout.split("RMSProp on backend ")
    reason = "fastrms was built without its C extension"
    assert re.search(rf"^backends .*numpy; no c: {reason}", config, re.M)
    assert f"The C backend is not available: {reason}" in report
    assert f"RuntimeError: backend='c' is not available: {reason}" in run.stderr


def test_one_version_and_licence_everywhere():
    """pyproject.toml, the package, the citation, the changes."""
    texts = {name: (ROOT / name).read_text() for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")}
    version = re.search(r'^version = "(.*)"$', texts["pyproject.toml"], re.M)[1]
    assert version == fastrms.__version__ == re.search(r"^version: (.*)$", texts["CITATION.cff"], re.M)[1]
    assert version in texts["CHANGELOG.md"] and re.search(r"^license: MIT$", texts["CITATION.cff"], re.M)
    assert 'license = "MIT"' in texts["pyproject.toml"] and (ROOT / "LICENSE").read_text().startswith("MIT License\n")


def test_every_backend_is_found_from_the_import_statements():
    """As tools that freeze a program (PyInstaller, cx_Freeze) look for it."""
    outside = ["numpy", "numba", "torch", "cuda", "safetensors", "threadpoolctl", "llvmlite", "cffi"]
    finder = ModuleFinder(path=[str(Path(c.__file__).parents[2]), *sys.path], excludes=outside)
    finder.import_hook("fastrms")
    extension = ["fastrms._core", "_cffi_backend"] if c.lib else []
    for name in [*(f"fastrms.backends.{name}" for name in backends.NAMES), *extension]:
        assert name in finder.modules, name


def test_a_system_without_fork():
    code = (
        "import os; del os.register_at_fork, os.fork; import numpy as np, fastrms; w = np.ones(3);"
        "[fastrms.RMSProp(w, backend=name).step(w.copy()) for name in fastrms.available_backends() if name != 'cuda'];"
        "print(bool((w < 1).all()))"
    )
    assert question(code) == "True"


@pytest.mark.parametrize("name", ["numba", "numba_cuda", "torch"])
def test_a_module_without_spec_does_not_end_the_import(name):
    """A stand-in in the place of a package that we ask for."""
    code = (
        f"import sys, types; sys.modules[{name!r}] = types.ModuleType({name!r}); sys.modules[{name!r}].__spec__ = None;"
        "import fastrms; print({'c', 'numpy'} & set(fastrms.available_backends()) > set())"
    )
    assert question(code) == "True"
