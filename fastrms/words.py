"""How error sentences call what they were given: its kind, and its value."""

import re

_SPOKEN_WITH_A_VOWEL = re.compile("[aeio]|un|nd|np|rms|rprop", re.I)


def with_article(word):
    """A word with "a" or "an" before it."""
    return f"an {word}" if _SPOKEN_WITH_A_VOWEL.match(word) else f"a {word}"


def kind_of(x):
    """The kind of an object with its article: "a list", "an ndarray"."""
    return with_article(type(x).__name__)


def shown(x):
    """repr(x), in which an array stands as its kind, shape and dtype, also where it lies in a list, tuple or dict."""
    if type(x) is dict:
        return f"{{{', '.join(f'{key!r}: {shown(value)}' for key, value in x.items())}}}"
    if type(x) in (list, tuple):
        begin, end = "[]" if type(x) is list else "()"
        comma = "," if type(x) is tuple and len(x) == 1 else ""
        return f"{begin}{', '.join(map(shown, x))}{comma}{end}"
    if getattr(x, "shape", ()) and hasattr(x, "dtype"):
        return f"<{type(x).__name__} of shape {tuple(x.shape)}, {str(x.dtype).removeprefix('torch.')}>"
    return repr(x)
