"""Writes scikit-learn's handwritten digits for trainer.c: per line the digit and its 64 pixels, in a fixed random order.

Run with `python examples/trainer_c/export_digits.py digits.csv`.
"""

import sys

import numpy as np

try:
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] != "sklearn":
        raise
    sys.exit("scikit-learn is missing, which this example needs: pip install -e '.[examples]'")


def main(path):
    images, digits = load_digits(return_X_y=True)
    table = np.column_stack([digits, images]).astype(int)
    np.savetxt(path, np.random.default_rng(0).permutation(table), fmt="%d", delimiter=",")


if __name__ == "__main__":
    main(sys.argv[1]) if len(sys.argv) == 2 else sys.exit(__doc__)
