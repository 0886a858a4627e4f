"""Power of the MMD permutation test against sample size: python benchmarks/two_sample.py --help

Two Gaussians of 10 dimensions that differ in mean, or in width, or not at all; the share of trials
in which p <= 0.05, by kernel. Writes a plot.
"""

import argparse
import json
from pathlib import Path

import torch

from fastxm.ops import median_heuristic, mmd_permutation_test
from fastxm.ops.mmd import RBF, Linear

SIZES = (25, 50, 100, 200, 400)
WIDTH = 10
CASES = {"equal": (0.0, 1.0), "mean moved by 0.15": (0.15, 1.0), "width 1.15": (0.0, 1.15)}


def kernels(x, y):
    median = float(median_heuristic(x, y))
    mixture = RBF(tuple(median * s for s in (0.25, 0.5, 1.0, 2.0, 4.0)))
    return {"RBF, median": RBF(median), "RBF, 5 around the median": mixture, "linear": Linear()}


def power(shift: float, width: float, size: int, trials: int) -> dict[str, float]:
    """The share of trials that reject, by kernel."""
    found: dict[str, int] = {}
    for _ in range(trials):
        x = torch.randn(size, WIDTH)
        y = torch.randn(size, WIDTH) * width + shift
        for name, kernel in kernels(x, y).items():
            p = mmd_permutation_test(x, y, kernel, 199)[1]
            found[name] = found.get(name, 0) + int(p <= 0.05)
    return {name: count / trials for name, count in found.items()}


def draw(table: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    for axis, (case, rows) in zip(figure.subplots(1, len(table), sharey=True), table.items()):
        for name in next(iter(rows.values())):
            axis.plot(list(rows), [row[name] for row in rows.values()], marker="o", label=name)
        axis.axhline(0.05, color="gray", linewidth=0.8, linestyle="--")
        axis.set(title=case, xlabel="rows of each sample", xscale="log", ylim=(0, 1.02))
        axis.set_xticks(SIZES, [str(n) for n in SIZES])
        axis.minorticks_off()
    figure.axes[0].set_ylabel("share with p <= 0.05")
    figure.axes[-1].legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--trials", type=int, default=100)
    flags.add_argument("--out", type=Path, default=Path("docs/mmd_power.png"))
    args = flags.parse_args()
    torch.manual_seed(0)
    table = {case: {n: power(*how, n, args.trials) for n in SIZES} for case, how in CASES.items()}
    print(json.dumps(table, indent=1))
    draw(table, args.out)


if __name__ == "__main__":
    main()
