"""Which rho and eps?  scikit-learn's cross-validated grid search over RMSProp's hyper-parameters, on handwritten digits.

The estimator below is all it takes: fit trains a small network with fastrms, and scikit-learn can clone it, cross-validate
it and search over its parameters.

Run with `python examples/hyper_search.py`; prints the best pair and draws fastrms-search.png, a map of the scores.
"""

import argparse
import sys

import numpy as np

try:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import PercentFormatter
    from rich.console import Console
    from rich.table import Table
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.datasets import load_digits
    from sklearn.model_selection import GridSearchCV, StratifiedKFold
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ModuleNotFoundError as error:
    if error.name.partition(".")[0] not in ("matplotlib", "rich", "sklearn"):
        raise
    sys.exit(f"{error.name} is missing, which this example needs: pip install -e '.[examples]'")

from network import Network, batches

import fastrms

GRID = {"rho": [0.5, 0.9, 0.99, 0.999], "eps": [1e-8, 1e-4, 1e-3, 1e-2, 1e-1]}


class Classifier(ClassifierMixin, BaseEstimator):
    """One hidden layer, trained by RMSProp in mini-batches of 32."""

    def __init__(self, rho=0.99, eps=1e-8, lr=1e-3, hidden=32, epochs=8, seed=0):
        self.rho = rho
        self.eps = eps
        self.lr = lr
        self.hidden = hidden
        self.epochs = epochs
        self.seed = seed

    def fit(self, X, y):
        X, y = validate_data(self, X, y, dtype=np.float32)
        check_classification_targets(y)
        self.classes_, classes = np.unique(y, return_inverse=True)
        random = np.random.default_rng(self.seed)
        self.network_ = Network((X.shape[1], self.hidden, len(self.classes_)), random)
        optimizer = fastrms.RMSProp(self.network_.weights, lr=self.lr, rho=self.rho, eps=self.eps)
        optimizer.bind(self.network_.gradients)
        for _ in range(self.epochs):
            for batch in batches(32, len(X), random):
                self.network_.backward(X[batch], classes[batch])
                optimizer.step()
        return self

    def predict_proba(self, X):
        check_is_fitted(self)
        return self.network_.probabilities(validate_data(self, X, dtype=np.float32, reset=False))

    def predict(self, X):
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(axis=1)]


def search(images, digits, grid, folds, **fixed):
    """Search; returns the finished GridSearchCV.  The folds are shuffled by the seed."""
    parts = StratifiedKFold(folds, shuffle=True, random_state=fixed["seed"])
    return GridSearchCV(Classifier(**fixed), grid, cv=parts).fit(images, digits)


def as_map(found):
    """The mean scores with a row for each rho and a column for each eps."""
    pairs = zip(found.cv_results_["params"], found.cv_results_["mean_test_score"], strict=True)
    scores = {(at["rho"], at["eps"]): score for at, score in pairs}
    return np.array([[scores[rho, eps] for eps in GRID["eps"]] for rho in GRID["rho"]])


def draw(scores, best, picture):
    """Draw the mean accuracy of each pair, in a row per rho, and frame the best one."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(scores, cmap="viridis", aspect="auto")
    panel.set_xticks(range(len(GRID["eps"])), [f"{eps:g}" for eps in GRID["eps"]])
    panel.set_yticks(range(len(GRID["rho"])), GRID["rho"])
    middle = (scores.min() + scores.max()) / 2
    for (row, column), score in np.ndenumerate(scores):
        panel.text(column, row, f"{score:.1%}", ha="center", va="center", color="black" if score > middle else "white")
    row, column = GRID["rho"].index(best["rho"]), GRID["eps"].index(best["eps"])
    panel.add_patch(Rectangle((column - 0.48, row - 0.47), 0.96, 0.94, fill=False, edgecolor="#D55E00", linewidth=3))
    panel.set(xlabel="eps", ylabel="rho", title="Cross-validated accuracy of RMSProp")
    figure.colorbar(image, format=PercentFormatter(1, decimals=0))
    figure.savefig(picture, dpi=100)


def show(results):
    order = np.argsort(results["rank_test_score"], kind="stable")
    table = Table("rho", "eps", "accuracy", "spread", title=f"the best five of {len(order)}")
    for k in order[:5]:
        mean, spread = results["mean_test_score"][k], results["std_test_score"][k]
        table.add_row(*(f"{results['params'][k][name]:g}" for name in ("rho", "eps")), f"{mean:.2%}", f"{spread:.2%}")
    Console().print(table)


def main(arguments=None):
    """Search; returns the finished GridSearchCV."""
    parser = argparse.ArgumentParser(description="Searches RMSProp's rho and eps by cross-validation.")
    parser.add_argument("--seed", type=int, default=0, help="of the folds, the weights and the batches (default: 0)")
    parser.add_argument("--images", type=int, default=1797, help="how many of the 1797 digits (default: all)")
    parser.add_argument("--folds", type=int, default=3, help="default: 3")
    parser.add_argument("--epochs", type=int, default=8, help="of each training (default: 8)")
    parser.add_argument("--picture", default="fastrms-search.png", help="where it is written (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not 100 <= options.images <= 1797 or options.folds < 2 or options.epochs < 1:
        parser.error("--images must be 100 to 1797, --folds at least 2, --epochs at least 1")
    images, digits = load_digits(return_X_y=True)
    chosen = np.random.default_rng(options.seed).permutation(len(digits))[: options.images]
    found = search(images[chosen] / 16, digits[chosen], GRID, options.folds, seed=options.seed, epochs=options.epochs)
    draw(as_map(found), found.best_params_, options.picture)
    show(found.cv_results_)
    return found


if __name__ == "__main__":
    main()
