"""The site that Sphinx makes of README.md, CONTRIBUTING.md and docs/ (extra `docs`): no warning, and every public name."""

import re
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from conftest import FUNCTIONS
from test_docstrings import PUBLIC

for needed in ("sphinx", "furo", "myst_parser", "numpydoc", "torch", "numba_cuda"):
    pytest.importorskip(needed)
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of a site that was built without a warning: each link has its page, each anchor its heading."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "docs", str(folder)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    return folder


def test_every_public_name_is_on_the_page_of_the_interface(site):
    """objects.inv lists what the site describes, packed behind four lines of text."""
    packed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    found = set(re.findall(r"^(\S+) py:", zlib.decompress(packed).decode(), re.M))
    names = {name for name, _ in PUBLIC if name.startswith("fastrms.")}
    names |= {f"fastrms.numba.{name}{form}" for name in FUNCTIONS for form in ("", "_parallel")}
    assert len(names) > 40 and not (names | {"fastrms.rules", "fastrms.cuda.compile_ptx"}) - found


def test_its_first_page_leads_to_all_others(site):
    target = re.search(r"url=([\w/.]+)", (site / "index.html").read_text())[1]
    text = (site / target).read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f'href="{page.stem}.html"' in text, page


def test_the_mathematics_stand_on_the_page_of_the_design(site):
    text = re.sub(r"<[^>]*>", "", (site / "docs" / "design.html").read_text())
    assert text.count("square_avg = flush(rho * square_avg + (one_minus_rho * g) * g, tiny, zero)") == 2 + 2 * 4
