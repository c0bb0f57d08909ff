"""A small language model in torch on real text, trained with torch.optim and with fastrms.torch from the same start.

The text is what Python and torch themselves ship: the language reference (pydoc_data) and torch's reference of its
functions, together about a megabyte.  The model is a transformer that predicts the next character.  Both optimizers of a
pair see the same batches, rates and clipping, so that their losses lie on each other; what differs is the time of a step.

    python examples/text_torch.py                # two minutes on two cores; draws fastrms-text.png
    python examples/text_torch.py --steps 20     # a try

Needs the extra torch, and matplotlib (extra examples) for the picture.
"""

import argparse
import pathlib
import pydoc_data.topics
import sys
import time

import numpy as np

try:
    import torch
    from matplotlib.figure import Figure
    from torch import nn
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("matplotlib", "torch"):
        raise
    sys.exit(f"{error.name} is missing, which this example needs: pip install -e '.[torch,examples]'")

import fastrms.torch

CONTEXT, BATCH, WIDTH, HEADS, LAYERS = 64, 32, 128, 4, 2
CLIP, WARMUP = 1.0, 20
PAIRS = {  # name: torch.optim's, ours; both with torch's defaults but for the learning rate
    "Adam": (lambda p: torch.optim.Adam(p, lr=2e-3, fused=True), lambda p: fastrms.torch.Adam(p, lr=2e-3, clip_norm=CLIP)),
    "RMSprop": (lambda p: torch.optim.RMSprop(p, lr=1e-3), lambda p: fastrms.torch.RMSprop(p, lr=1e-3, clip_norm=CLIP)),
}


def text():
    """The characters as a tensor of small integers, and how many kinds there are."""
    package = pathlib.Path(torch.__file__).parent
    reference = [package.joinpath(f"_{name}_docs.py").read_text() for name in ("torch", "tensor")]
    parts = [*pydoc_data.topics.topics.values(), *reference]
    kinds, codes = np.unique(np.frombuffer("".join(parts).encode(errors="replace"), np.uint8), return_inverse=True)
    return torch.from_numpy(codes.astype(np.int64)), len(kinds)


class Model(nn.Module):
    """A transformer that sees CONTEXT characters and predicts the next after each of them."""

    def __init__(self, kinds):
        super().__init__()
        self.characters, self.places = nn.Embedding(kinds, WIDTH), nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.out = nn.Linear(WIDTH, kinds)
        self.mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)

    def forward(self, codes):
        return self.out(self.layers(self.characters(codes) + self.places, mask=self.mask, is_causal=True))


def train(make, steps, codes, kinds):
    """(loss of each step, seconds of all steps of the optimizer, seconds of the whole training)."""
    torch.manual_seed(0)
    model, random = Model(kinds), np.random.default_rng(0)
    optimizer = make(model.parameters())
    warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))
    clips = not isinstance(optimizer, fastrms.torch.Optimizer)
    losses, in_steps, start = [], 0.0, time.perf_counter()
    for _ in range(steps):
        at = torch.from_numpy(random.integers(0, len(codes) - CONTEXT - 1, BATCH))[:, None] + torch.arange(CONTEXT + 1)
        batch = codes[at]
        loss = nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        before = time.perf_counter()
        if clips:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        in_steps += time.perf_counter() - before
        warm_up.step()
        losses.append(loss.item())
    return losses, in_steps, time.perf_counter() - start


def draw(found, path):
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, (name, runs) in zip(figure.subplots(1, len(found), sharey=True), found.items(), strict=True):
        for (label, (losses, _, _)), style in zip(runs.items(), ("-", "--"), strict=True):
            smooth = np.convolve(losses, np.ones(10) / 10, "valid") if len(losses) >= 10 else losses
            axes.plot(smooth, style, label=label)
        axes.set(title=name, xlabel="step")
        axes.legend()
    figure.axes[0].set_ylabel("cross-entropy per character, mean of 10 steps")
    figure.savefig(path, dpi=120)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="of training, for each optimizer (default 300)")
    parser.add_argument("--picture", default="fastrms-text.png", help="where to draw (default fastrms-text.png)")
    chosen = parser.parse_args(arguments)
    codes, kinds = text()
    count = sum(p.numel() for p in Model(kinds).parameters())
    print(f"{len(codes):,} characters of {kinds} kinds, {count:,} parameters, {chosen.steps} steps of {BATCH} x {CONTEXT}")
    print("| optimizer | last loss | step and clipping, ms | training, s |\n| --- | ---: | ---: | ---: |")
    found = {}
    for name, makers in PAIRS.items():
        found[name] = {}
        for label, make in zip((f"torch.optim.{name}", f"fastrms.torch.{name}"), makers, strict=True):
            losses, in_steps, all_in_all = found[name][label] = train(make, chosen.steps, codes, kinds)
            last = np.mean(losses[-10:])
            print(f"| {label} | {last:.4f} | {in_steps / chosen.steps * 1e3:.2f} | {all_in_all:.1f} |", flush=True)
    draw(found, chosen.picture)
    print(f"picture: {chosen.picture}")
    return found


if __name__ == "__main__":
    main()
