"""One cell of a table: all contenders of a rule at one size and placement, checked, and timed in interleaved rounds."""

import fastrms

from . import timing
from .check import check
from .contenders import contenders
from .problem import at_places


def measure(results, rule, size, seconds, names=None, peers=None, threads=None):
    """Check the contenders of these names, or all, and add their timings to the results.

    A small problem is measured at several places.  Of the peers, whose calls take far longer than its update, only the
    first place is measured.  peers: name -> function of a Problem.
    """
    problems, made, reasons = at_places(rule, size, results.dtype, results.placement), [], {}
    for problem in problems:
        rivals = peers if peers and problem is problems[0] else {}
        here, missing = contenders(problem, threads or fastrms.get_num_threads(), names, rivals)
        check(problem, here)
        made += here
        reasons |= missing
    calls = {(contender.name, contender.way): [] for contender in made}
    for contender in made:
        calls[contender.name, contender.way].append(contender.step)
    results.add(rule, size, made, timing.at_places(calls, seconds), reasons)
