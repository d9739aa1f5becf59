"""Plays the built-in game with every method over several seeds and prints them side by side.

    python benchmarks/methods.py --seeds=3 [--workdir=runs/benchmark] [--config.train.learning_rate=1e-4 ...]

Every run is the ordinary command line in a process of its own; finished runs are read, not repeated. All methods
start from the same SFT policy of their seed, see the same prompts, and take the same number of steps; all but T-SPIN
and DPO at the same learning rate (configs/scales.py, configs/dpo.py). "Best" rows stop at the round (the start counts)
with the highest accuracy on the validation problems; what is printed is always measured on the test problems. ± is the
standard deviation over seeds, of the difference to the start in the last column.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time

import numpy as np

METHODS = ("sft", "dpo", "spin", "tspin", "tpaw")
_NAMES = {"sft": "continued SFT", "dpo": "DPO (needs labels)", "spin": "SPIN", "tspin": "T-SPIN", "tpaw": "TPAW"}
_SELECT = "validation_sampled_accuracy"


def play(method: str, seed: int, workdir: pathlib.Path, overrides: list[str]) -> float:
    """Runs one game to its end; returns its wall time in seconds."""
    began = time.monotonic()
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "selfplay_jax.main",
            f"--config=configs/{method}.py",
            f"--workdir={workdir}",
            f"--config.seed={seed}",
            "--config.evaluation.select=sampled_accuracy",
            "--config.export=none",
            *overrides,
        ],
        check=False,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if run.returncode:
        sys.exit(f"{method}, seed {seed}: {run.stderr.strip().splitlines()[-1]}")
    return time.monotonic() - began


def evaluations(workdir: pathlib.Path) -> list[dict[str, float]]:
    """What every checkpoint of a run scored, θ_0 first."""
    files = [workdir / "sft/summary.json", *sorted(workdir.glob("rounds/*/summary.json"))]
    return [json.loads(file.read_text())["eval"] for file in files]


def row(name: str, chosen: list[dict[str, float]], starts: list[dict[str, float]]) -> str:
    """One line of the table: means over seeds, and the gain over each seed's own start."""

    def column(key: str, scale: float, digits: int) -> str:
        values = scale * np.array([scores[key] for scores in chosen])
        return f"{values.mean():.{digits}f} ± {values.std(ddof=1) if len(values) > 1 else 0:.{digits}f}"

    pairs = zip(chosen, starts, strict=True)
    gains = 100 * np.array([one["sampled_accuracy"] - start["sampled_accuracy"] for one, start in pairs])
    gain = f"{gains.mean():+.1f} ± {gains.std(ddof=1) if len(gains) > 1 else 0:.1f}"
    sampled, greedy = column("sampled_accuracy", 100, 1), column("greedy_accuracy", 100, 1)
    return f"| {name} | {sampled} | {greedy} | {column('target_logp', 1, 2)} | {gain} |"


def main() -> None:
    """Plays what is missing, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=METHODS, choices=METHODS)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/benchmark"))
    options, overrides = parser.parse_known_args()
    runs: dict[str, list[list[dict[str, float]]]] = {}
    for method in options.methods:
        for seed in range(options.seeds):
            workdir = options.workdir / f"{method}-{seed}"
            seconds = play(method, seed, workdir, overrides)
            runs.setdefault(method, []).append(evaluations(workdir))
            print(f"{method}, seed {seed}: {seconds:.0f} s", file=sys.stderr, flush=True)
    starts = [scores[0] for scores in next(iter(runs.values()))]
    print("| | sampled % | greedy % | held-out log π(y) | sampled - start |\n|---|---|---|---|---|")
    print(row("SFT start", starts, starts))
    for method, games in runs.items():
        print(row(f"{_NAMES[method]}, last round", [scores[-1] for scores in games], starts))
        best = [max(scores, key=lambda one: one[_SELECT]) for scores in games]
        print(row(f"{_NAMES[method]}, best on validation", best, starts))


if __name__ == "__main__":
    main()
