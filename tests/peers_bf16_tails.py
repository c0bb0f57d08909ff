"""Which fused CPU optimizers compute other bits in the body of their loop than in its tail?

    python tests/peers_bf16_tails.py

A program, not a test: it prints one line for each optimizer and dtype that is installed here.  The elements of a tensor
do not depend on each other, so element k of a long tensor should have the bits of the same element in a tensor of size 1,
which no vector instruction serves.  All lengths from 0 to 130 are tried, each at an aligned and at an odd address, between
guard zones.  Fused SGD of torch 2.12 and 2.13 leaves all whole vectors of bf16 and fp16 as they were (pytorch#191763).
"""

import importlib.util
import itertools
import sys
from functools import partial
from pathlib import Path

import torch

LENGTHS, STEPS, ZONE, FILL = range(131), 3, 64, 7.0
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OF_TORCH = {
    "torch SGD": (torch.optim.SGD, {"lr": 0.1}),
    "torch SGD, momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "torch SGD, weight decay": (torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "torch Adam": (torch.optim.Adam, {"lr": 0.1}),
    "torch Adam, amsgrad": (torch.optim.Adam, {"lr": 0.1, "amsgrad": True}),
    "torch AdamW": (torch.optim.AdamW, {"lr": 0.1}),
    "torch Adagrad": (torch.optim.Adagrad, {"lr": 0.1}),
}


def contenders():
    """(name, function from a list of parameters to an optimizer)."""
    for name, (make, options) in OF_TORCH.items():
        yield f"{name}, fused", partial(make, fused=True, **options)
    if importlib.util.find_spec("bitsandbytes"):
        from bitsandbytes import optim

        for make, options in ((optim.SGD, {"momentum": 0.9}), (optim.RMSprop, {}), (optim.Adagrad, {}), (optim.Adam, {})):
            yield f"bitsandbytes {make.__name__}, 32-bit states", partial(make, lr=0.1, **options)
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    if importlib.util.find_spec("fastrms"):
        yield from ours()


def ours():
    import fastrms

    kinds = {"RMSProp": fastrms.RMSProp, "AdaGrad": fastrms.AdaGrad, "Adam": fastrms.Adam, "AdamW": fastrms.AdamW}
    for (name, make), master in itertools.product(kinds.items(), (None, "split16")):
        for state_format in (None, "bf16"):
            said = {"lr": 0.1, "state_format": state_format, "rounding": "nearest", "master": master}
            yield f"fastrms {name}, states {state_format}, master {master}", partial(Ours, make, said)


class Ours:
    """An optimizer of fastrms with the step() of torch's."""

    def __init__(self, make, said, params):
        half = params[0].dtype != torch.float32
        self.params = params
        self.optimizer = make(params, **(said if half else {**said, "master": None}))

    def step(self):
        self.optimizer.step([param.grad for param in self.params])


class Guarded:
    """A parameter within a longer tensor."""

    def __init__(self, values, offset):
        self.memory = torch.full((len(values) + 2 * ZONE + offset,), FILL, dtype=values.dtype)
        self.start, self.end = ZONE + offset, ZONE + offset + len(values)
        self.array = self.memory[self.start : self.end]
        self.array.copy_(values)
        self.array.requires_grad_()

    def intact(self):
        return bool((self.memory[: self.start] == FILL).all() and (self.memory[self.end :] == FILL).all())


def stepped(make, params, grads):
    """The parameters after some steps, each with its gradient."""
    optimizer = make(params)
    for step in range(STEPS):
        for param, grad in zip(params, grads, strict=True):
            param.grad = (grad * (step + 1)).to(param.dtype)
        optimizer.step()
    return [param.detach() for param in params]


def fault(make, dtype):
    """What is wrong, in words; None where every length has the bits of single elements."""
    generator = torch.Generator().manual_seed(0)
    values, grads = (torch.randn(max(LENGTHS), generator=generator).to(dtype) for _ in range(2))
    alone = torch.cat(stepped(make, [x.clone().requires_grad_() for x in values.split(1)], grads.split(1)))
    first, unmoved, other, outside = None, 0, 0, False
    for length, offset in itertools.product(LENGTHS, (0, 1)):
        guarded = Guarded(values[:length], offset)
        (found,) = stepped(make, [guarded.array], [grads[:length]])
        wrong = found != alone[:length]
        if first is None and wrong.any():
            first = length
        still = int((wrong & (found == values[:length])).sum())
        unmoved, other = max(unmoved, still), max(other, int(wrong.sum()) - still)
        outside |= not guarded.intact()
    if first is None and not outside:
        return None
    written = "; elements outside of the tensor are written" if outside else ""
    return f"from length {first} on; of {max(LENGTHS)} elements {unmoved} stay as they were, {other} get other bits{written}"


def main():
    print(f"torch {torch.__version__}")
    for (name, make), dtype in itertools.product(contenders(), DTYPES):
        if "split" in name and dtype is not torch.bfloat16:
            continue
        try:
            said = fault(make, dtype)
        except (RuntimeError, TypeError, ValueError) as error:
            print(f"refused  {dtype!s:15} {name}: {str(error).splitlines()[0][:120]}")
        else:
            print(f"{'FAILS' if said else 'holds':8} {dtype!s:15} {name}{': ' + said if said else ''}", flush=True)


if __name__ == "__main__":
    main()
