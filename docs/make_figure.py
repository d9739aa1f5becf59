"""Draws README's picture, docs/demo.svg, from the files of finished runs.

    python docs/make_figure.py runs/tpaw-demo runs/spin-demo runs/tspin-demo runs/sft-demo

Left: sampled accuracy on held-out problems by checkpoint; right: held-out log π(y). Bars are one standard error over
problems. Directories of one method (its seeds) are drawn as their mean; bars are then one standard error over seeds.
"""

import argparse
import math
from collections.abc import Sequence

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from selfplay_jax.report_data import Run, load, number

PANELS = (("sampled_accuracy", "sampled accuracy (%)", 100.0), ("target_logp", "held-out log π(y) (nats)", 1.0))
NAMES = {"sft": "continued SFT", "spin": "SPIN", "tspin": "T-SPIN", "tpaw": "TPAW"}


def curve(runs: Sequence[Run], key: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checkpoint numbers, means and standard errors of one evaluated number, over the checkpoints all runs have."""
    found: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        for round_ in run.evaluated:
            value, error = number(round_.summary, "eval", key), number(round_.summary, "eval", f"{key}_se")
            if value is not None:
                found.setdefault(round_.theta, []).append((value, error or 0.0))
    thetas = sorted(theta for theta, values in found.items() if len(values) == len(runs))
    values = np.array([[value for value, _ in found[theta]] for theta in thetas]).reshape(len(thetas), len(runs))
    if len(runs) > 1:
        errors = values.std(axis=1, ddof=1) / math.sqrt(len(runs))
    else:
        errors = np.array([found[theta][0][1] for theta in thetas])
    return np.array(thetas), values.mean(axis=1), errors


def draw(workdirs: Sequence[str], output: str) -> None:
    """Writes the picture of all runs, grouped by method in the order given."""
    methods: dict[str, list[Run]] = {}
    for workdir in workdirs:
        run = load(workdir)
        methods.setdefault(run.method, []).append(run)
    matplotlib.rcParams |= {"svg.hashsalt": "selfplay_jax", "font.size": 9, "axes.grid": True, "grid.alpha": 0.25}
    matplotlib.rcParams |= {"axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(8.4, 3.0), layout="constrained")
    for ax, (key, label, scale) in zip(axes, PANELS, strict=True):
        for i, (method, runs) in enumerate(methods.items()):
            theta, mean, error = curve(runs, key)
            shifted = theta + 0.03 * (i - (len(methods) - 1) / 2)  # error bars side by side
            style = {"marker": "os^D"[i % 4], "markersize": 4, "capsize": 2.5, "linewidth": 1.5}
            ax.errorbar(shifted, scale * mean, scale * error, label=NAMES.get(method, method), **style)
            ax.set_xticks(theta, [f"θ{t}" for t in theta])
        ax.set(ylabel=label, xlabel="checkpoint (θ0: the SFT start)")
    axes[0].legend(frameon=False)
    figure.savefig(output, metadata={"Date": None})


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("workdir", nargs="+", help="finished runs; those of one method are averaged")
    parser.add_argument("--output", default="docs/demo.svg")
    arguments = parser.parse_args()
    draw(arguments.workdir, arguments.output)


if __name__ == "__main__":
    main()
