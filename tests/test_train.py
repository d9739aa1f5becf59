"""One training step against the papers' loss in float64 and the optimizers' formulas; rates, batches, filler rows."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_models import PLAIN, loud_params, reference_token_logps
from toy_training import MODEL, SETTINGS, TPAW, assert_close, built, fresh_params, run_steps, spin, table

from selfplay_jax.groups import epoch_order
from selfplay_jax.logprobs import response_logps
from selfplay_jax.methods import Objective, plan
from selfplay_jax.table import Table, batches, schedule

DATA = table(24, opponents=2, players=1)
SFT = plan("sft", {}, round_index=0, window=1).objective


def float64_loss(params, data: Table, rows) -> float:
    """SPIN's loss of a batch of rows (first sample of every round), from a float64 forward pass per response."""
    losses = []
    for n in rows:
        logps = [
            reference_token_logps(PLAIN, params, data.prompts[n], z).sum()
            for z in (data.targets[n], data.opponents[0][n][0], data.opponents[1][n][0])
        ]
        old = [float(data.players[c][0, n, 0]) for c in range(3)]
        margins = [0.1 * ((logps[0] - old[0]) - (logps[c] - old[c])) for c in (1, 2)]
        losses.append(np.mean(np.logaddexp(0.0, -np.array(margins))))
    return float(np.mean(losses))


@functools.cache
def gradient_program():
    """Loss and gradient of SPIN on a batch of real rows, written anew on top of response_logps."""

    def loss(params, batch):
        ratio = response_logps(MODEL, params, batch.group) - batch.players[:, 0]
        margins = 0.1 * (ratio[:, :1] - ratio[:, 1:])
        return jnp.mean(jnp.log1p(jnp.exp(-margins)))

    return jax.jit(jax.value_and_grad(loss))


def batch_of(step: int):
    return DATA.batch(np.arange(8 * step, 8 * step + 8), size=8, epoch=0, per_round=1)


def test_loss_and_gradient_against_float64():
    params = loud_params(MODEL, 0)
    _, metrics = run_steps(built(spin()), DATA, [0.0], size=8, rows=8)
    loss, gradient = gradient_program()(params, batch_of(0))
    np.testing.assert_allclose(metrics[0]["loss"], float64_loss(params, DATA, range(8)), rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["loss"], loss, rtol=1e-6)
    np.testing.assert_allclose(metrics[0]["grad_norm"], optax.global_norm(gradient), rtol=1e-5)
    rng = np.random.default_rng(1)
    for _ in range(2):  # the slope along a random direction
        along = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
        ends = [
            float64_loss(jax.tree.map(lambda x, d, h=h: x + h * d, params, along), DATA, range(8))
            for h in (1e-6, -1e-6)
        ]
        slope = sum(np.vdot(g, d) for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(along), strict=True))
        np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-6, rtol=1e-3)


def clipped(gradient, norm):
    if not norm:
        return gradient
    factor = min(1.0, norm / float(optax.global_norm(gradient)))
    return jax.tree.map(lambda g: g * factor, gradient)


def adamw(settings, gradients, params, rates):
    """The formulas of the papers; `gradients(params, step)`."""
    first = second = jax.tree.map(np.zeros_like, params)
    for step, rate in enumerate(rates):
        g = gradients(params, step)
        first = jax.tree.map(lambda m, g: settings.b1 * m + (1 - settings.b1) * g, first, g)
        second = jax.tree.map(lambda v, g: settings.b2 * v + (1 - settings.b2) * g * g, second, g)
        a, b = 1 - settings.b1 ** (step + 1), 1 - settings.b2 ** (step + 1)
        params = jax.tree.map(
            lambda p, m, v, a=a, b=b, rate=rate: p
            - rate * (m / a / (np.sqrt(v / b) + settings.eps) + settings.weight_decay * p),
            params, first, second,
        )  # fmt: skip
    return params


def rmsprop(settings, gradients, params, rates):
    second = jax.tree.map(np.zeros_like, params)
    for step, rate in enumerate(rates):
        g = gradients(params, step)
        second = jax.tree.map(lambda v, g: settings.decay * v + (1 - settings.decay) * g * g, second, g)
        params = jax.tree.map(
            lambda p, g, v, rate=rate: p - rate * (g / np.sqrt(v + settings.eps) + settings.weight_decay * p),
            params, g, second,
        )  # fmt: skip
    return params


def adafactor(settings, gradients, params, rates):
    """optax's own, its learning rate inside; weight decay is off."""
    state = optax.adafactor(1.0).init(params)
    for step, rate in enumerate(rates):
        updates, state = optax.adafactor(rate).update(gradients(params, step), state, params)
        params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
    return params


@pytest.mark.parametrize(
    ("by_hand", "changed"),
    [
        (adamw, {}),
        (adamw, {"clip_norm": 0.05}),
        (rmsprop, {}),
        (adafactor, {"weight_decay": 0.0}),
    ],
    ids=["adamw", "adamw-clipped", "rmsprop", "adafactor"],
)
def test_two_steps_by_hand(by_hand, changed):
    settings = dataclasses.replace(SETTINGS, optimizer=by_hand.__name__, **changed)
    norms = []

    def gradients(params, step):
        _, gradient = gradient_program()(jax.tree.map(np.float32, params), batch_of(step))
        gradient = jax.tree.map(np.asarray, gradient)
        norms.append(float(optax.global_norm(gradient)))
        return clipped(gradient, settings.clip_norm)

    state, metrics = run_steps(built(spin(), settings), DATA, [1e-2, 3e-3], size=8, rows=8)
    wanted = by_hand(settings, gradients, loud_params(MODEL, 0), [1e-2, 3e-3])
    assert int(state.step) == 2
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), loud_params(MODEL, 0))
    assert_close(moved, jax.tree.map(np.subtract, wanted, loud_params(MODEL, 0)), rtol=2e-3, atol=5e-4)
    assert_close(state.params, wanted, rtol=1e-4, atol=1e-5)
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(moved)) > 1e-4  # nothing stood still
    # The norm that is logged is the one before clipping.
    np.testing.assert_allclose([m["grad_norm"] for m in metrics], norms, rtol=1e-3)
    assert not settings.clip_norm or min(norms) > settings.clip_norm
    assert all(m["finite"] for m in metrics)


def test_update_norm_is_what_moved():
    state, metrics = run_steps(built(spin()), DATA, [1e-2], size=8, rows=8)
    moved = jax.tree.map(np.subtract, jax.device_get(state.params), loud_params(MODEL, 0))
    np.testing.assert_allclose(metrics[0]["update_norm"], optax.global_norm(moved), rtol=1e-3)


@pytest.mark.parametrize(
    ("schedule_name", "warmup", "steps", "expected"),
    [
        ("constant", 0.0, 3, [1.0, 1.0, 1.0]),
        ("constant", 0.5, 4, [0.5, 1.0, 1.0, 1.0]),
        ("linear", 0.0, 4, [1.0, 0.75, 0.5, 0.25]),
        ("linear", 0.4, 5, [0.5, 1.0, 1.0, 2 / 3, 1 / 3]),
        ("cosine", 0.0, 4, [1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("cosine", 0.2, 5, [1.0, 1.0, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]),
        ("linear", 0.9, 1, [1.0]),
        ("linear", 0.0, 1, [1.0]),
    ],
)
def test_learning_rates_by_hand(schedule_name, warmup, steps, expected):
    settings = dataclasses.replace(SETTINGS, schedule=schedule_name, warmup=warmup, learning_rate=3e-5)
    rates = settings.learning_rates(steps)
    assert rates.shape == (steps,)
    np.testing.assert_allclose(rates, 3e-5 * np.array(expected), rtol=1e-5)


def test_accumulated_gradients_are_those_of_the_whole_batch():
    data = dataclasses.replace(DATA, usable=[u.copy() for u in DATA.usable])
    data.usable[0][[0, 3]] = False  # the microbatches' counts differ
    data.usable[1][[3, 5]] = False  # row 3 has nothing to compare
    states = {}
    for accumulate in (1, 2, 4):
        settings = dataclasses.replace(SETTINGS, accumulate=accumulate)
        states[accumulate] = run_steps(built(spin(), settings), data, [1e-2, 1e-2], size=8, rows=7)
    for accumulate in (2, 4):
        (found, metrics), (wanted, whole) = states[accumulate], states[1]
        assert_close(found.params, wanted.params, rtol=1e-6, atol=2e-6)
        assert_close(metrics, whole, rtol=2e-5, atol=1e-5)


def test_sft_is_the_token_mean_over_the_batch():
    data = Table(DATA.prompts, DATA.targets, [], [], [np.zeros((0, 24, 1), np.float32)])
    params = loud_params(MODEL, 0)
    _, metrics = run_steps(built(SFT), data, [0.0], size=8, rows=5)  # three filler rows
    nll = [-reference_token_logps(PLAIN, params, data.prompts[n], data.targets[n]).sum() for n in range(5)]
    tokens = sum(len(data.targets[n]) for n in range(5))
    np.testing.assert_allclose(metrics[0]["loss"], sum(nll) / tokens, rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["logp_target"], -np.mean(nll), rtol=1e-5)
    assert len({len(data.targets[n]) for n in range(5)}) > 2


def test_filler_rows_and_rows_with_nothing_to_compare_change_nothing():
    few = run_steps(built(spin()), DATA, [1e-2], size=5, rows=5)
    more = run_steps(built(spin()), DATA, [1e-2], size=8, rows=5)
    assert_close(more[0].params, few[0].params, rtol=1e-6, atol=1e-6)
    assert_close(more[1], few[1], rtol=1e-5, atol=1e-6)
    dropped = dataclasses.replace(DATA, usable=[np.ones((24, 2), bool) for _ in range(2)])
    for usable in dropped.usable:
        usable[5:] = False  # rows 5, 6 and 7 are in the batch and have no opponent left
    none = run_steps(built(spin()), dropped, [1e-2], size=8, rows=8)
    assert_close(none[0].params, few[0].params, rtol=1e-6, atol=1e-6)
    assert_close(none[1], few[1], rtol=1e-5, atol=1e-6)


def test_a_broken_triple_does_not_count():
    fields = tuple(sorted({"alpha": 0.3, "beta": 0.5, "kind": "logistic", "reference": False}.items()))
    objective = Objective("tspin", fields, 2)
    players = [np.zeros((0, 24, width), np.float32) for width in (1, 2, 2)]
    data = dataclasses.replace(DATA, players=players, usable=[np.ones((24, 2), bool) for _ in range(2)])
    data.usable[1][4:] = False  # y_t is there, y_0 is not
    few = run_steps(built(objective), data, [1e-2], size=8, rows=4)
    more = run_steps(built(objective), data, [1e-2], size=8, rows=8)
    assert_close(more[1], few[1], rtol=1e-5, atol=1e-6)
    assert_close(more[0].params, few[0].params, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])  # log π of a target under a player: the margin is nan, -inf
def test_a_step_that_is_not_finite_changes_nothing(bad):
    parts = built(spin())
    data = dataclasses.replace(DATA, players=[p.copy() for p in DATA.players])
    data.players[0][0, 10] = bad  # in the second step's batch
    state, first = run_steps(parts, data, [1e-2], size=8, rows=8)
    before = jax.device_get(state)
    batch = jax.device_put(data.batch(np.arange(8, 16), size=8, epoch=0, per_round=1), parts.rows)
    after, metrics = parts.step(state, {}, batch, np.float32(1e-2))
    assert first[0]["finite"] and not metrics["finite"]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after), before)
    assert int(after.step) == 1


def test_one_parameter_tree_is_in_memory_at_a_time():
    """What init and step are given is given away; batches are not."""
    parts, params = built(spin()), fresh_params()
    state = parts.init(params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    batch = jax.device_put(batch_of(0), parts.rows)
    after, _ = parts.step(state, {}, batch, np.float32(1e-2))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((after, batch)))


def test_the_order_of_batches_is_fixed_by_seed_round_and_epoch():
    steps = schedule(10, 4, 3, seed=5, round_index=2)
    assert [(epoch, len(rows)) for epoch, rows in steps] == [(e, n) for e in range(3) for n in (4, 4, 2)]
    orders = [np.concatenate([rows for e, rows in steps if e == epoch]) for epoch in range(3)]
    assert all(sorted(order) == list(range(10)) for order in orders)
    for epoch, order in enumerate(orders):
        np.testing.assert_array_equal(order, epoch_order(10, seed=5, round_index=2, epoch=epoch))
    others = [epoch_order(10, seed=s, round_index=t, epoch=0) for s, t in ((5, 2), (6, 2), (5, 3), (5, -1))]
    assert len({tuple(order) for order in [*orders, *others]}) == 6


def test_opponents_come_in_rotation():
    data = table(6, opponents=2, players=2, samples=3)
    rows = np.array([4, 1])
    for epoch, taken in ((0, [0, 1]), (1, [2, 0]), (2, [1, 2]), (3, [0, 1])):
        batch = data.batch(rows, size=3, epoch=epoch, per_round=2)
        assert batch.group.responses.shape[:2] == batch.present.shape == (3, 5)
        assert batch.players.shape == (3, 2, 5) and batch.players.dtype == np.float32
        assert batch.real.tolist() == [True, True, False]
        assert batch.present.tolist() == [[True] * 5] * 2 + [[False] * 5]
        for b, n in enumerate([4, 1, 4]):  # the filler row is a copy
            wanted = [data.targets[n], *(data.opponents[r][n][s] for r in (0, 1) for s in taken)]
            lengths = batch.group.response_lengths[b]
            found = [z[:length].tolist() for z, length in zip(batch.group.responses[b], lengths, strict=True)]
            assert found == wanted
            scores = [data.players[0][:, n, :], *(data.players[r][:, n, taken] for r in (1, 2))]
            np.testing.assert_array_equal(batch.players[b], np.concatenate(scores, axis=-1))


def test_responses_that_are_not_used_are_masked():
    data = table(6, opponents=1, players=1, samples=3)
    usable = np.ones((6, 3), bool)
    usable[2, 1] = False
    batch = dataclasses.replace(data, usable=[usable]).batch(np.array([2, 3]), size=2, epoch=1, per_round=1)
    assert batch.present.tolist() == [[True, False], [True, True]]


@pytest.mark.parametrize("kind", ["temp_size_in_bytes", "flops"])
def test_a_tpaw_step_costs_the_same_with_any_number_of_players(kind):
    costs = []
    for players in (1, 2, 3):
        data = table(8, opponents=3, players=players)  # K = 4 whoever judges
        objective = Objective("tpaw", tuple(sorted(TPAW.items())), 3)
        parts = built(objective)
        batch = data.batch(np.arange(8), size=8, epoch=0, per_round=1)
        compiled = compiled_step(parts, batch, players)
        costs.append(
            compiled.cost_analysis()["flops"] if kind == "flops" else compiled.memory_analysis().temp_size_in_bytes
        )
    assert max(costs) <= 1.01 * min(costs), costs


_compiled = {}


def compiled_step(parts, batch, players: int):
    if players not in _compiled:
        _compiled[players] = parts.step.lower(parts.abstract, {}, batch, np.float32(0)).compile()
    return _compiled[players]


def test_batches_come_in_the_schedule_s_order_and_go_on_where_they_stood():
    data = table(10, opponents=2, players=1)
    steps = schedule(10, 4, 2, seed=3, round_index=1)
    whole = list(batches(data, steps, size=4, per_round=1))
    assert len(whole) == len(steps) == 6
    for (epoch, rows), found in zip(steps, whole, strict=True):
        assert_close(found, data.batch(rows, size=4, epoch=epoch, per_round=1), rtol=0)
    loader = batches(data, steps, size=4, per_round=1)
    for _ in range(3):
        next(loader)
    position = json.loads(json.dumps(loader.get_state()))  # as a checkpoint keeps it
    again = batches(data, steps, size=4, per_round=1)
    again.set_state(position)
    for found, wanted in zip(again, whole[3:], strict=True):
        assert_close(found, wanted, rtol=0)
