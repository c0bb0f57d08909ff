"""What five frameworks mean by RMSProp, AdaGrad, Adam, AdamW and RProp, as values of our explicit parameters.

Each entry lists only where the framework differs from fastrms' own defaults (which are PyTorch's).
`eps` always stands outside the square root and `eps_root` inside it, whatever the framework calls it.
Where the framework requires an lr, ours stays.  Sources: the frameworks' code, see docs/dialects.md.
"""

from .words import shown

_KERAS = {"lr": 1e-3, "decoupled": True}
_INSIDE = {"rho": 0.9, "eps": 0.0, "lr_in_momentum": True}

DIALECTS = {
    "torch": {"RMSProp": {}, "AdaGrad": {}, "Adam": {}, "AdamW": {}, "RProp": {}},
    "keras": {
        "RMSProp": {**_KERAS, **_INSIDE, "eps_root": 1e-7},
        "AdaGrad": {**_KERAS, "eps": 0.0, "eps_root": 1e-7, "initial_value": 0.1},
        "Adam": {**_KERAS, "eps": 1e-7, "bias_correction": "folded"},
        "AdamW": {**_KERAS, "eps": 1e-7, "bias_correction": "folded", "weight_decay": 0.004},
    },
    "tf1": {
        "RMSProp": {**_INSIDE, "eps_root": 1e-10, "initial_value": 1.0},
        "AdaGrad": {"eps": 0.0, "initial_value": 0.1},
        "Adam": {"bias_correction": "folded"},
    },
    "mindspore": {
        "RMSProp": {"lr": 0.1, **_INSIDE, "eps_root": 1e-10, "initial_value": 1.0},
        "AdaGrad": {"lr": 1e-3, "eps": 0.0, "eps_root": 1e-8, "initial_value": 0.1},  # measured, MindSpore 2.10 on CPU
        "Adam": {"bias_correction": "folded"},
        "AdamW": {"eps": 1e-6, "bias_correction": False, "weight_decay": 0.0},
        "RProp": {"lr": 0.1},
    },
    "optax": {
        "RMSProp": {**_INSIDE, "eps_root": 1e-8},
        "AdaGrad": {"eps": 0.0, "eps_root": 1e-7, "initial_value": 0.1},
        "Adam": {},
        "AdamW": {"weight_decay": 1e-4},
        "RProp": {},
    },
}


def meaning_of_true(dialect, name):
    """What True stands for where a hyper-parameter has more than two values."""
    if name == "bias_correction" or (dialect, name) == ("optax", "amsgrad"):
        return "corrected"
    return True


def preset(dialect, optimizer):
    """The defaults of `optimizer` in `dialect` that differ from ours; ValueError where there is none."""
    if dialect is None:
        return {}
    if not isinstance(dialect, str) or dialect not in DIALECTS:
        raise ValueError(f"dialect={shown(dialect)} is not one of {', '.join(map(repr, DIALECTS))}")
    if optimizer not in DIALECTS[dialect]:
        raise ValueError(f"dialect={dialect!r} has no {optimizer}")
    return DIALECTS[dialect][optimizer]
