"""The square roots that csrc/roots.h computes on the multipliers are those of the divider to the last bit: tried on every
float, on every estimate that a processor may give, and on the doubles that are hardest to round."""

import itertools
import re
import struct
import subprocess

import pytest
from conftest import c
from test_build import COMPILER, ROOT, flags, needs_c

pytestmark = [
    needs_c,
    pytest.mark.skipif(COMPILER is None, reason="no C compiler here"),
    pytest.mark.skipif("avx512fma" not in c.isas(), reason="this CPU has no avx512fma tier"),
]
NEAR = 20_000  # in units of 2^-56 ulp: a thousand times what the rounding of the last step can decide


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """roots(arguments, input): the lines that tests/c/roots.c prints."""
    program = tmp_path_factory.mktemp("roots") / "roots"
    command = [COMPILER, *flags(), f"-I{ROOT / 'csrc'}", str(ROOT / "tests" / "c" / "roots.c"), "-lm", "-o", str(program)]
    subprocess.run(command, check=True, capture_output=True)

    def run(*arguments, text=""):
        return subprocess.run([program, *arguments], input=text, capture_output=True, text=True).stdout.splitlines()

    return run


def test_the_root_of_every_float(roots):
    assert roots("floats") == [f"{1 << 32} compared, 0 lines differ"]


def test_the_root_of_every_float_from_every_estimate(roots):
    """By scaling, this is every float from 2^-102 on, and every processor whose estimates are within 2^-14."""
    (line,) = roots("pairs", "0", "1")
    compared, differ = map(int, re.findall(r"\d+", line))
    assert compared > 24e9 and differ == 0


def square_roots(k, n):
    """The numbers whose square is k modulo 2^n, for k = 1 modulo 8."""
    root = 1
    for j in range(3, n):
        if (root * root - k) >> j & 1:
            root += 1 << (j - 1)
    half, whole = 1 << (n - 1), 1 << n
    return {root % whole, -root % whole, (root + half) % whole, (half - root) % whole}


def hard_doubles():
    """The doubles in [1, 4) whose root is within NEAR/2^56 ulp of the middle between two doubles, which is half an odd
    number u of ulps: the squares u*u that end in zeros, but for a small k."""
    found = set()
    for n, k in itertools.product((54, 55), range(1 - NEAR - (-NEAR) % 8, NEAR, 8)):
        for t in square_roots(k, n):
            for u in (t, t + (1 << n)):
                x = (u * u - k) >> n
                if 2**53 <= u < 2**54 and (u * u - k) % 2**n == 0 and 2**52 <= x < 2**53:
                    found.add((1023 + n - 54) << 52 | (x - 2**52))
    return found


def test_the_roots_of_the_hardest_doubles(roots):
    """The numbers for which the estimate decides are exactly those that csrc/roots.c tries on each CPU."""
    hard = hard_doubles()
    assert len(hard) > 7000
    *undecided, line = roots("doubles", text="".join(f"{bits:x}\n" for bits in hard))
    compared, differ = map(int, re.findall(r"\d+", line))
    assert compared > 80e6 and differ == 0
    listed = re.findall(r"0x1\.\w+p\+[01]", (ROOT / "csrc" / "roots.c").read_text())
    of_bits = {struct.unpack("<d", struct.pack("<Q", int(bits, 16)))[0] for bits in undecided}
    assert of_bits == {float.fromhex(x) for x in listed} and len(listed) == 29
