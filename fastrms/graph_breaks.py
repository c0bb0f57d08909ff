"""torch.compile does not trace fastrms: a compiled function leaves its graph at our functions and runs them as they are."""

import contextlib
import sys
from types import FunctionType

_COMPILER = "torch._dynamo"  # the module of torch.compile, which torch imports when it is first used
_untold = []  # functions at which torch.compile shall leave its graph, and does not know it yet


def at(*entrances):
    """Name functions, or classes whose functions and properties, no graph shall contain."""
    for entrance in entrances:
        members = [entrance] if isinstance(entrance, FunctionType) else vars(entrance).values()
        for member in members:
            for part in (member, *(getattr(member, name, None) for name in ("fget", "fset", "__func__"))):
                if isinstance(part, FunctionType):
                    part._torchdynamo_disable = True  # a call of it is not traced
                    _untold.append(part)
    if _COMPILER in sys.modules:
        tell_torch()


def tell_torch():
    """Have frames of these functions, and what they call, run as they are."""
    with contextlib.suppress(AttributeError, TypeError):  # a torch with another interface
        of_torch = sys.modules["torch"]._C._dynamo.eval_frame
        skip = of_torch._FrameExecStrategy(of_torch._FrameAction.SKIP, of_torch._FrameAction.SKIP)
        for function in _untold:
            of_torch.set_code_exec_strategy(function.__code__, skip)
    _untold.clear()


class Watch:
    """A finder of modules that finds none: it is asked when torch.compile is imported, which is the time to tell it."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == _COMPILER:
            tell_torch()
            sys.meta_path.remove(Watch)


if _COMPILER not in sys.modules:
    sys.meta_path.insert(0, Watch)
