"""A round's training as a whole: on every mesh the same numbers, and after every stop the same bytes."""

import dataclasses

import jax
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec
from tiny_models import mesh_of
from toy_training import MODEL, SETTINGS, assert_close, built, fresh_params, one_device, run_steps, spin, table

from selfplay_jax import metrics, partitioning
from selfplay_jax.checkpoints import Checkpoints
from selfplay_jax.errors import Stopped, UserError
from selfplay_jax.train import STRIDE, summarise, train

MESHES = [(8, 1), (4, 2), (2, 4), (2, 2, 2)]
DATA = table(24, opponents=2, players=1)
# Six batches: three an epoch, the last of each with filler rows.
RUN = dataclasses.replace(SETTINGS, batch_size=8, epochs=2, warmup=0.2)


@pytest.fixture(scope="module")
def one_device_steps():
    state, seen = run_steps(built(spin()), DATA, [1e-2, 1e-2], size=8, rows=7)
    return jax.device_get(state), seen


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_meshes_agree_with_one_device(shape, one_device_steps):
    mesh = mesh_of(*shape)
    parts = built(spin(), mesh=mesh)
    state, seen = run_steps(parts, DATA, [1e-2, 1e-2], size=8, rows=7, params=fresh_params(mesh))
    wanted, metrics_wanted = one_device_steps
    assert_close(jax.device_get(state.params), wanted.params, rtol=1e-5, atol=1e-5)
    assert_close(seen, metrics_wanted, rtol=1e-5, atol=1e-5)
    # What comes out lies where the table says, the optimizer's moments like their parameters.
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(parts.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    gate = PartitionSpec(None, "fsdp", "tensor")
    adam = next(s for s in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(s, "mu"))
    for tree in (state.params, adam.mu, adam.nu):
        kernel = tree["layers"]["gate"]["kernel"]
        assert kernel.sharding.spec == gate
        assert kernel.addressable_shards[0].data.shape == (2, 16 // shape[-2], 32 // shape[-1])
    assert adam.count.sharding.is_fully_replicated and state.step.sharding.is_fully_replicated


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "adafactor"])
def test_moments_lie_like_their_parameters(optimizer):
    """Nothing is compiled here: the shardings alone."""
    settings = dataclasses.replace(SETTINGS, optimizer=optimizer, clip_norm=1.0)
    parts = built(spin(), settings, partitioning.make_mesh(4, 2))
    by_shape = {}
    for leaf in jax.tree.leaves(parts.abstract.params):
        by_shape.setdefault(leaf.shape, set()).add(leaf.sharding.spec)
    sharded = 0
    for leaf in jax.tree.leaves(parts.abstract.opt_state):
        assert leaf.sharding.spec in by_shape.get(leaf.shape, {PartitionSpec()})
        sharded += not leaf.sharding.is_fully_replicated
    cut = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(parts.abstract.params))
    assert sharded == cut * (2 if optimizer == "adamw" else 1)


class Workdir:
    """A workdir with its checkpoints, opened again for every attempt as a new process would."""

    def __init__(self, path):
        self.path = epath.Path(path)

    def train(self, data=DATA, settings=RUN, round_index=1, stop_at=10**9):
        """Trains; from the `stop_at`th question on, the answer is to stop."""
        asked = iter(range(10**9))
        checkpoints = Checkpoints(self.path / "checkpoints", window=2)
        try:
            return jax.device_get(
                train(
                    MODEL, fresh_params(), data, spin(), settings, mesh=one_device(), seed=3, round_index=round_index,
                    opponents_per_prompt=1, checkpoints=checkpoints, directory=self.path / "round",
                    should_stop=lambda: next(asked) >= stop_at,
                )
            )  # fmt: skip
        finally:
            checkpoints.close()

    def saved(self):
        checkpoints = Checkpoints(self.path / "checkpoints", window=2)
        try:
            return checkpoints.state_step()
        finally:
            checkpoints.close()

    def rows(self):
        """The metrics without what the clock says."""
        rows = metrics.read(self.path / "round" / "metrics.jsonl")
        return [{k: v for k, v in row.items() if k not in ("time", "tokens_per_second")} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    workdir = Workdir(tmp_path_factory.mktemp("uninterrupted"))
    return workdir.train(), workdir


def same_bytes(found, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32)), found, wanted)


def test_a_round_trains_every_step_once(uninterrupted):
    _, workdir = uninterrupted
    rows = workdir.rows()
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == [0, 0, 0, 1, 1, 1] and {row["round"] for row in rows} == {1}
    np.testing.assert_allclose([row["learning_rate"] for row in rows], RUN.learning_rates(6), rtol=1e-6)
    assert workdir.saved() == 2 * STRIDE + 6
    summary = summarise(workdir.path / "round")
    assert summary["steps"] == 6 and 0 < summary["padding_share"] < 1
    np.testing.assert_allclose(summary["train"]["margin"], np.mean([row["margin"] for row in rows[3:]]))
    assert (summary["train"]["loss_first"], summary["train"]["loss_last"]) == (rows[0]["loss"], rows[5]["loss"])


@pytest.mark.parametrize("stop_at", range(6))
def test_a_round_goes_on_after_a_stop_at_any_step(uninterrupted, tmp_path, stop_at):
    wanted, whole = uninterrupted
    workdir = Workdir(tmp_path)
    with pytest.raises(Stopped):
        workdir.train(stop_at=stop_at)
    assert workdir.saved() == (2 * STRIDE + stop_at if stop_at else None)
    same_bytes(workdir.train(), wanted)
    assert workdir.rows() == whole.rows()
    same_bytes(workdir.train(), wanted)  # finished: nothing is left to do
    assert workdir.rows() == whole.rows()


def test_a_round_goes_on_after_many_stops_and_a_kill(uninterrupted, tmp_path):
    wanted, whole = uninterrupted
    workdir = Workdir(tmp_path)
    for stop_at in (1, 0, 2):
        with pytest.raises(Stopped):
            workdir.train(stop_at=stop_at)
    with (tmp_path / "round" / "metrics.jsonl").open("a") as file:  # killed past the last save, in a line's middle
        file.write('{"kind": "train", "round": 1, "step": 4, "epoch": 1, "loss": 7.0}\n{"kind": "tr')
    same_bytes(workdir.train(), wanted)
    assert workdir.rows() == whole.rows()


def test_the_state_of_another_round_is_not_taken(uninterrupted, tmp_path):
    wanted, _ = uninterrupted
    workdir = Workdir(tmp_path)
    short = dataclasses.replace(RUN, epochs=1)
    workdir.train(settings=short, round_index=0)
    assert workdir.saved() == STRIDE + 3
    same_bytes(workdir.train(), wanted)  # from the parameters it was given


def test_a_loss_that_is_not_finite_stops_the_round_and_keeps_what_was_saved(uninterrupted, tmp_path):
    wanted, _ = uninterrupted
    workdir = Workdir(tmp_path)
    bad = dataclasses.replace(DATA, players=[p.copy() for p in DATA.players])
    bad.players[0][:] = np.nan
    with pytest.raises(UserError, match=r"not finite at step 1 of training round 1 \(loss nan.*learning rate"):
        workdir.train(data=bad)
    assert workdir.saved() is None
    with pytest.raises(Stopped):
        workdir.train(stop_at=3)
    with pytest.raises(UserError, match="not finite at step 4 of training round 1"):
        workdir.train(data=bad)
    assert workdir.saved() == 2 * STRIDE + 3
    same_bytes(workdir.train(), wanted)
