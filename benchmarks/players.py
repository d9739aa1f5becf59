"""Does a TPAW step cost more with more players? Times and sizes the compiled step for 1, 2 and 3 of them.

    python benchmarks/players.py [--repeats=20]

The groups are the same for every number of players (the target and three rounds' responses); only the number of frozen
players whose log-probabilities weigh them changes. Steps of the three programs take turns, so that a machine whose
speed drifts does so for all. Prints the median step time, its ratio to one player, and the compiled program's memory.
"""

import argparse
import time

import jax
import numpy as np

from selfplay_jax import partitioning
from selfplay_jax.methods import plan
from selfplay_jax.models import Model, ModelConfig
from selfplay_jax.table import Table
from selfplay_jax.train import Settings, programs

LOSS = {"lam": 1.0, "eta": 6.0, "gamma": 0.5}


def table(players: int, prompts: int, rng: np.random.Generator) -> Table:
    """A random round: prompts of 10 tokens, one response of 22 tokens from each of three rounds."""

    def ids(length: int) -> list[int]:
        return rng.integers(1, 50, length).tolist()

    scores = [np.zeros((players, prompts, 1), np.float32) for _ in range(4)]
    opponents = [[[ids(22)] for _ in range(prompts)] for _ in range(3)]
    usable = [np.ones((prompts, 1), bool)] * 3
    return Table([ids(10) for _ in range(prompts)], [ids(22) for _ in range(prompts)], opponents, usable, scores)


def main() -> None:
    """Compiles the three steps, runs them in turn, prints a row for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    config = ModelConfig("llama", 512, 128, 384, 2, 4, 2, 32)
    model, mesh = Model(config), partitioning.make_mesh()
    settings = Settings(
        epochs=1, batch_size=options.batch, accumulate=1, optimizer="adamw", b1=0.9, b2=0.999, eps=1e-8, decay=0.99,
        weight_decay=0.0, clip_norm=1.0, learning_rate=1e-5, schedule="constant", warmup=0.0, checkpoint_every=1,
    )  # fmt: skip
    objective = plan("tpaw", LOSS, round_index=2, window=3).objective
    parts = programs(model, objective, settings, mesh)
    runs = {}
    for players in (1, 2, 3):
        rows = table(players, options.batch, np.random.default_rng(0))
        batch = rows.batch(np.arange(options.batch), size=options.batch, epoch=0, per_round=1)
        batch = jax.device_put(batch, parts.rows)
        state = parts.init(model.init(jax.random.key(0)))
        step = parts.step.lower(state, {}, batch, np.float32(1e-5)).compile()  # type: ignore[attr-defined]
        state, _ = step(state, {}, batch, np.float32(1e-5))
        runs[players] = [step, state, batch, []]
    for _ in range(options.repeats):
        for run in runs.values():
            step, state, batch, seconds = run
            began = time.perf_counter()
            state, metrics = step(state, {}, batch, np.float32(1e-5))
            jax.block_until_ready(metrics)
            seconds.append(time.perf_counter() - began)
            run[1] = state
    print("| players | step ms (median) | ratio to 1 | temporary MiB | arguments MiB |\n|---|---|---|---|---|")
    first = np.median(runs[1][3])
    for players, (step, _, _, seconds) in runs.items():
        memory, median = step.memory_analysis(), np.median(seconds)
        sizes = f"{memory.temp_size_in_bytes / 2**20:.2f} | {memory.argument_size_in_bytes / 2**20:.2f}"
        print(f"| {players} | {1e3 * median:.1f} | {median / first:.3f} | {sizes} |")


if __name__ == "__main__":
    main()
