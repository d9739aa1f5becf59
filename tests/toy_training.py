"""A tiny model and tables of random tokens to train it on: what the tests of scoring and training share."""

import functools

import jax
import numpy as np
from tiny_models import PLAIN, VOCAB, loud_params, random_rows

from selfplay_jax import partitioning
from selfplay_jax.methods import Objective, plan
from selfplay_jax.models.decoder import Model
from selfplay_jax.table import Table
from selfplay_jax.train import Programs, Settings, TrainState, programs

MODEL = Model(PLAIN)
SPIN = {"lam": 0.1, "kind": "logistic", "mix_previous": True}
TPAW = {
    "lam": 0.1, "eta": 6.0, "gamma": 0.5, "target_weighting": True, "player_weighting": True,
    "differentiate_weights": False, "kind": "logistic", "tolerance": 1e-6,
}  # fmt: skip
# eps is large: with a small one the first steps follow the sign of a gradient, and so its rounding.
SETTINGS = Settings(
    epochs=2, batch_size=8, accumulate=1, optimizer="adamw", b1=0.9, b2=0.99, eps=1e-2, decay=0.9, weight_decay=0.1,
    clip_norm=0.0, learning_rate=1e-2, schedule="linear", warmup=0.0, checkpoint_every=2,
)  # fmt: skip


def spin(round_index: int = 1) -> Objective:
    """SPIN's objective; from round 1 on with two rounds of opponents."""
    return plan("spin", SPIN, round_index=round_index, window=3).objective


def one_device() -> jax.sharding.Mesh:
    """A mesh of one device."""
    return partitioning.make_mesh(1, 1, jax.devices()[:1])


def fresh_params(mesh: jax.sharding.Mesh | None = None, seed: int = 0, model: Model = MODEL):
    """The model's parameters as new arrays: a training step takes (donates) those that it is given."""
    return jax.device_put(loud_params(model, seed), model.shardings(mesh or one_device()))


@functools.cache
def table(count: int, opponents: int, players: int, samples: int = 2, seed: int = 0) -> Table:
    """Random prompts of 3 to 7 tokens, answers of 1 to 8; every batch of them has the one shape [.., 8], [.., 8]."""
    rng = np.random.default_rng(seed)

    def answers() -> list[list[int]]:
        return random_rows(rng, rng.integers(1, 9, count).tolist(), VOCAB)

    columns = [[list(row) for row in zip(*(answers() for _ in range(samples)), strict=True)] for _ in range(opponents)]
    return Table(
        prompts=random_rows(rng, rng.integers(3, 8, count).tolist(), VOCAB),
        targets=answers(),
        opponents=columns,
        usable=[np.ones((count, samples), bool)] * opponents,
        players=[
            rng.normal(-20, 4, (players, count, width)).astype(np.float32) for width in [1] + [samples] * opponents
        ],
    )


def run_steps(
    parts: Programs, data: Table, rates: list[float], *, size: int, rows: int, params=None
) -> tuple[TrainState, list[dict[str, float]]]:
    """Takes a step for every rate, on consecutive `rows` of the table; the metrics of each."""
    state = parts.init(params if params is not None else fresh_params())
    seen = []
    for step, rate in enumerate(rates):
        batch = data.batch(np.arange(step * rows, (step + 1) * rows), size=size, epoch=0, per_round=1)
        state, metrics = parts.step(state, {}, jax.device_put(batch, parts.rows), np.float32(rate))
        seen.append({name: float(value) for name, value in metrics.items()})
    return state, seen


def built(objective: Objective, settings: Settings = SETTINGS, mesh=None) -> Programs:
    """The jitted pieces on one device or on `mesh`."""
    return programs(MODEL, objective, settings, mesh or one_device())


def assert_close(found, wanted, rtol: float, atol: float = 0.0) -> None:
    """Every leaf close, atol relative to the leaf's largest entry."""

    def one(a, b):
        a, b = np.asarray(a), np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol * max(np.abs(b).max(), 1e-30))

    jax.tree.map(one, found, wanted)
