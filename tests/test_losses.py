"""The losses against scalar Python loops written from the papers' formulas, and METHOD's facts about them."""

import ast
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from selfplay_jax import losses

PAIR_KEYS = {"reward_target", "reward_generated", "margin", "accuracy"}
PAIR_KEYS |= {"logp_target", "logp_generated", "logp_gap", "higher_reward_lower_logp"}
TPAW_HP = {"lam": 0.7, "eta": 6.0, "gamma": 0.5}


@pytest.fixture(autouse=True)
def _no_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


# --- the reference: one example at a time, Python floats


def ref_l(kind, u):
    if kind == "hinge":
        return max(0.0, 1.0 - u)
    if kind == "exponential":
        return math.exp(-u) if u >= -30 else math.exp(30) * (1 - 30 - u)
    return math.log1p(math.exp(-u)) if u > 0 else -u + math.log1p(math.exp(u))


def ref_pair(loss, logp_t, logp_g, reward_t, reward_g, **more):
    margin = reward_t - reward_g
    return {
        "loss": loss,
        "reward_target": reward_t,
        "reward_generated": reward_g,
        "margin": margin,
        "accuracy": 1.0 if margin > 0 else 0.0,
        "logp_target": logp_t,
        "logp_generated": logp_g,
        "logp_gap": logp_t - logp_g,
        "higher_reward_lower_logp": 1.0 if margin > 0 and logp_t < logp_g else 0.0,
        **more,
    }


def ref_spin(t, g, old_t, old_g, *, lam, kind="logistic"):
    reward_t, reward_g = lam * (t - old_t), lam * (g - old_g)
    return ref_pair(ref_l(kind, reward_t - reward_g), t, g, reward_t, reward_g)


def ref_dpo(c, r, ref_c, ref_r, *, beta, kind="logistic"):
    loss = ref_l(kind, beta * ((c - r) - (ref_c - ref_r)))
    return ref_pair(loss, c, r, beta * (c - ref_c), beta * (r - ref_r))


def ref_tspin(t, g, p, *old, alpha, beta, kind="logistic"):
    rewards = [alpha * (z - z_old) for z, z_old in zip((t, g, p), old or (0.0, 0.0, 0.0), strict=True)]
    now, history = rewards[0] - rewards[1], rewards[1] - rewards[2]
    loss = ref_l(kind, now) + beta * ref_l(kind, history)
    more = {"reward_proto": rewards[2], "logp_proto": p, "historical_margin": history}
    return ref_pair(loss, t, g, rewards[0], rewards[1], **more)


def ref_tpaw(t, g, old_ts, old_gs, present, *, lam, eta, gamma, kind="logistic", target=True, team=True, weights=None):
    players = [j for j in range(len(old_ts)) if present[j]]
    reward_t = [lam * (t - old_ts[j]) if present[j] else 0.0 for j in range(len(old_ts))]
    reward_g = [lam * (g - old_gs[j]) if present[j] else 0.0 for j in range(len(old_ts))]
    alpha = {j: eta if target and reward_t[j] <= 0 else 1.0 for j in players}
    scores = {j: math.exp(-gamma * (reward_t[j] - reward_g[j])) if team else 1.0 for j in players}
    beta = {j: scores[j] / sum(scores.values()) for j in players}
    alpha, beta = weights or (alpha, beta)
    loss = sum(beta[j] * ref_l(kind, alpha[j] * reward_t[j] - reward_g[j]) for j in players)
    count = max(len(players), 1)
    more = {
        "alpha": sum(alpha.values()) / count,
        "boosted": sum(target and reward_t[j] <= 0 for j in players) / count,
        "beta_entropy": -sum(b * math.log(b) for b in beta.values()),
    }
    for j in range(len(old_ts)):
        more |= {f"reward_target_{j}": reward_t[j], f"reward_generated_{j}": reward_g[j]}
        more[f"beta_{j}"] = beta.get(j, 0.0)
    out = ref_pair(loss, t, g, sum(reward_t) / count, sum(reward_g) / count, **more)
    return out | {"weights": (alpha, beta)}


def loop(reference, policies, players=(), mask=None, **hp):
    """The reference over every example of broadcast arrays; players' arrays come as tuples over J."""
    shape = np.broadcast_shapes(*(x.shape for x in policies), *(x.shape[1:] for x in players))
    policies = [np.broadcast_to(x, shape) for x in policies]
    players = [np.broadcast_to(x, (len(x), *shape)) for x in players]
    present = np.broadcast_to(True if mask is None else mask, (len(players[0]) if players else 0, *shape))
    rows = []
    for i in np.ndindex(shape):
        args = [float(x[i]) for x in policies] + [[float(v) for v in x[:, *i]] for x in players]
        if reference is ref_tpaw:
            args.append(list(present[:, *i]))
        else:
            args = [x[0] if isinstance(x, list) else x for x in args]
        rows.append(reference(*args, **hp))
    return {key: np.array([row[key] for row in rows]).reshape(shape) for key in rows[0] if key != "weights"}


# --- cases shared by the tests

CASES = {
    "dpo": (losses.dpo, ref_dpo, 2, 1, {"beta": 0.3}),
    "spin": (losses.spin, ref_spin, 2, 1, {"lam": 0.7}),
    "tspin": (losses.tspin, ref_tspin, 3, 0, {"alpha": 0.8, "beta": 0.3}),
    "tpaw": (losses.tpaw, ref_tpaw, 2, 3, TPAW_HP),
}
each_method = pytest.mark.parametrize("name", CASES)
each_kind = pytest.mark.parametrize("kind", losses.LOSS_KINDS)


def example(num_policies, num_players, shape=(4, 3), seed=0):
    """float64 log-probabilities of a target [B, 1] and of O opponents [B, O], and those under J players."""
    rng = np.random.default_rng(seed)
    shapes = [(*shape[:-1], 1), shape, shape][:num_policies]
    policies = [rng.normal(-8.0, 1.5, s) for s in shapes]
    players = [rng.normal(-8.0, 1.5, (num_players, *s)) for s in shapes] if num_players else []
    return policies, players


def call(fn, *args, **hp):
    """One compilation instead of one for each operation: twenty times as fast as the eager call."""
    return jax.jit(lambda *x: fn(*x, **hp))(*args)


def floats(*args):
    return [jnp.asarray(x, jnp.float32) for x in args]


def assert_matches(got, expected, rtol, atol):
    loss, metrics = got
    assert {"loss", *metrics} == set(expected)
    for key, value in {"loss": loss, **metrics}.items():
        assert value.shape == expected["loss"].shape, key
        np.testing.assert_allclose(value, expected[key], rtol=rtol, atol=atol, err_msg=key)


# --- tables


def test_spin_by_hand():
    # Target two nats up, response one nat down: margin 0.1 * 3, log(1 + exp(-0.3)) = 0.5543552444685272.
    loss, metrics = call(losses.spin, *floats([-10.0], [-9.0], [-12.0], [-8.0]), lam=0.1)
    np.testing.assert_allclose(loss, [0.5543552444685272], rtol=1e-6)
    expected = {
        "reward_target": 0.2,
        "reward_generated": -0.1,
        "margin": 0.3,
        "accuracy": 1.0,
        "logp_gap": -1.0,
    }
    expected |= {"higher_reward_lower_logp": 1.0, "logp_target": -10.0, "logp_generated": -9.0}
    assert set(metrics) == PAIR_KEYS == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], [value], rtol=1e-5, err_msg=key)


def test_tpaw_by_hand():
    # Player 0 is the policy itself: P = 0, so alpha = 6 and m = 0. Player 1: P(y) = 1, P(y_gen) = -1, m = 2.
    # beta = (1, e^-1) / (1 + e^-1); loss = beta_0 log 2 + beta_1 log(1 + e^-2).
    args = floats([-10.0], [-12.0], [[-10.0], [-11.0]], [[-12.0], [-11.0]])
    loss, metrics = call(losses.tpaw, *args, lam=1.0, eta=6.0, gamma=0.5)
    expected = {"beta_0": 0.7310586, "beta_1": 0.2689414, "alpha": 3.5, "boosted": 0.5, "margin": 1.0}
    expected |= {"reward_target": 0.5, "reward_generated": -0.5, "accuracy": 1.0, "logp_gap": 2.0}
    expected |= {"reward_target_0": 0.0, "reward_target_1": 1.0, "reward_generated_0": 0.0}
    expected |= {"reward_generated_1": -1.0, "beta_entropy": 0.5822031, "higher_reward_lower_logp": 0.0}
    expected |= {"logp_target": -10.0, "logp_generated": -12.0}
    assert set(metrics) == set(expected)
    np.testing.assert_allclose(loss, [0.5408669], rtol=1e-6)
    for key, value in expected.items():
        np.testing.assert_allclose(metrics[key], [value], rtol=1e-5, atol=1e-7, err_msg=key)


def test_tspin_by_hand():
    # l(0.5) + 0.1 * l(-1) = 0.4740769841801067 + 0.1 * 1.3132616875182228.
    loss, metrics = call(losses.tspin, *floats([-3.0], [-4.0], [-2.0]), alpha=0.5, beta=0.1)
    np.testing.assert_allclose(loss, [0.605403152931929], rtol=1e-6)
    assert set(metrics) == PAIR_KEYS | {"reward_proto", "logp_proto", "historical_margin"}
    np.testing.assert_allclose([metrics["reward_proto"][0], metrics["historical_margin"][0]], [-1.0, -1.0])


def test_sft_is_a_token_mean():
    logp, count = jnp.array([-6.0, -1.0, -5.0]), jnp.array([2, 1, 3])
    by_row, metrics = losses.sft(logp, count)
    np.testing.assert_allclose(by_row, [3.0, 1.0, 5.0 / 3.0], rtol=1e-6)
    np.testing.assert_array_equal(metrics["logp_target"], logp)
    np.testing.assert_array_equal(metrics["nll_per_token"], by_row)
    over_batch, metrics = losses.sft(logp, jnp.mean(count.astype(jnp.float32)))
    np.testing.assert_allclose(over_batch.mean(), 12.0 / 6.0, rtol=1e-6)
    assert metrics["nll_per_token"].shape == (3,)
    np.testing.assert_allclose(jax.grad(lambda x: losses.sft(x, count)[0].sum())(logp), -1.0 / count, rtol=1e-6)


def test_sft_row_without_tokens_costs_nothing():
    def total(x):
        return losses.sft(x, jnp.array([0, 2]))[0].sum()

    for empty in (0.0, -3.0, np.nan):
        value, grad = jax.value_and_grad(total)(jnp.array([empty, -3.0]))
        assert value == 1.5
        np.testing.assert_array_equal(grad, [0.0, -0.5])


@each_kind
@each_method
def test_matches_the_reference(name, kind):
    fn, reference, num_policies, num_players, hp = CASES[name]
    policies, players = example(num_policies, num_players)
    expected = loop(reference, policies, players, kind=kind, **hp)
    with jax.enable_x64(True):
        got = call(fn, *policies, *players, kind=kind, **hp)
        assert all(x.dtype == np.float64 for x in (got[0], *got[1].values()))
        assert_matches(got, expected, rtol=1e-12, atol=1e-12)
    assert_matches(call(fn, *policies, *players, kind=kind, **hp), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("target", "team"), [(False, True), (True, False), (False, False)])
def test_tpaw_ablations_match_the_reference(target, team):
    policies, players = example(2, 3, seed=3)
    expected = loop(ref_tpaw, policies, players, target=target, team=team, **TPAW_HP)
    with jax.enable_x64(True):
        off = {"target_weighting": target, "player_weighting": team}
        got = call(losses.tpaw, *policies, *players, **off, **TPAW_HP)
        assert_matches(got, expected, rtol=1e-12, atol=1e-12)


def test_tspin_with_reference():
    policies, players = example(3, 1, seed=1)
    hp = {"alpha": 0.8, "beta": 0.3}
    expected = loop(ref_tspin, policies, players, **hp)
    assert expected["higher_reward_lower_logp"].any()

    def with_reference(t, g, p, old_t, old_g, old_p):
        return losses.tspin(t, g, p, player_target=old_t, player_generated=old_g, player_proto=old_p, **hp)

    with jax.enable_x64(True):
        assert_matches(call(with_reference, *policies, *players), expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"^player_proto: missing"):
        losses.tspin(*policies, **hp, player_target=players[0], player_generated=players[1])


def test_every_metric_takes_more_than_one_value():
    """The tables above would not notice a constant otherwise."""
    policies, players = example(2, 3, (64, 2))
    for key, value in call(losses.tpaw, *policies, *players, **TPAW_HP)[1].items():
        assert np.unique(value).size > 1, key
    metrics = call(losses.tspin, *example(3, 0, (64, 2))[0], alpha=1.0, beta=0.1)[1]
    assert not metrics["higher_reward_lower_logp"].any()


# --- gradients


@each_kind
@each_method
def test_gradients_are_finite_differences(name, kind):
    fn, _, num_policies, num_players, hp = CASES[name]
    policies, players = example(num_policies, num_players, (2, 2), seed=5)
    hp = hp | ({"differentiate_weights": True} if name == "tpaw" else {})
    with jax.enable_x64(True):
        loss = jax.jit(lambda *x: fn(*x, kind=kind, **hp)[0])
        check_grads(loss, (*policies, *players), 1, rtol=1e-4, atol=1e-6)


def test_tpaw_weights_are_constants_to_the_gradient():
    policies = [np.array([-8.0]), np.array([-8.5])]
    players = [np.array([[-9.0], [-7.0], [-8.5]]), np.array([[-8.0], [-8.2], [-9.5]])]
    base = np.concatenate([np.ravel(x) for x in policies + players])

    def frozen(x):
        return ref_tpaw(x[0], x[1], x[2:5], x[5:8], [True] * 3, weights=weights, **TPAW_HP)["loss"]

    weights = ref_tpaw(base[0], base[1], base[2:5], base[5:8], [True] * 3, **TPAW_HP)["weights"]
    assert set(weights[0].values()) == {6.0, 1.0}
    steps = 1e-6 * np.eye(8)
    expected = [(frozen(base + step) - frozen(base - step)) / 2e-6 for step in steps]

    def grads(flow):
        fn = jax.grad(lambda x: losses.tpaw(*x, differentiate_weights=flow, **TPAW_HP)[0].sum())
        return np.concatenate([np.ravel(x) for x in jax.jit(fn)([*map(jnp.asarray, policies + players)])])

    with jax.enable_x64(True):
        constant, flowing = grads(False), grads(True)
    np.testing.assert_allclose(constant, expected, rtol=1e-6)
    # The policy moves all margins alike, which a softmax does not see: only the players' gradients differ.
    np.testing.assert_allclose(flowing[:2], expected[:2], rtol=1e-6)
    assert np.abs(flowing[2:] - expected[2:]).min() > 1e-4


@each_method
def test_metrics_carry_no_gradient(name):
    fn, _, num_policies, num_players, hp = CASES[name]
    policies, players = example(num_policies, num_players)
    hp = hp | ({"differentiate_weights": True} if name == "tpaw" else {})
    grad = jax.grad(lambda x: sum(m.sum() for m in fn(*x, **hp)[1].values()))
    assert all((g == 0).all() for g in jax.jit(grad)(floats(*policies, *players)))


def tspin_gradients(shape=(500,), seed=0, **hp):
    policies = floats(*np.random.default_rng(seed).normal(-8.0, 1.5, (3, *shape)))
    return jax.jit(jax.grad(lambda x: losses.tspin(*x, **hp)[0].sum()))(policies)


@each_kind
def test_tspin_gradient_signs(kind):
    target, generated, proto = tspin_gradients(alpha=1.0, beta=0.5, kind=kind)
    assert (target <= 0).all()
    assert (target < 0).any()
    assert (proto >= 0).all()
    assert (proto > 0).any()
    assert (generated < 0).any()
    assert (generated > 0).any()


def test_tspin_without_historical_advantage():
    policies, _ = example(3, 0)
    loss = call(losses.tspin, *policies, alpha=0.8, beta=0.0)[0]
    no_player = [np.zeros((1, *x.shape)) for x in policies[:2]]
    np.testing.assert_allclose(loss, loop(ref_spin, policies[:2], no_player, lam=0.8)["loss"], rtol=1e-5)
    assert (tspin_gradients(alpha=1.0, beta=0.0)[2] == 0).all()


# --- TPAW's facts


@each_kind
def test_tpaw_stripped_is_spin(kind):
    policies, players = example(2, 1)
    off = {"target_weighting": False, "player_weighting": False, **TPAW_HP}

    def both(fn, **hp):
        def mean(x):
            loss, metrics = fn(*x, *players, kind=kind, **hp)
            return loss.mean(), {"loss": loss, **metrics}

        return jax.jit(jax.grad(mean, has_aux=True))(floats(*policies))

    (spin_grads, spin), (tpaw_grads, tpaw) = both(losses.spin, lam=0.7), both(losses.tpaw, **off)
    for key, value in spin.items():
        np.testing.assert_allclose(tpaw[key], value, rtol=1e-6, atol=1e-6, err_msg=key)
    for a, b in zip(spin_grads, tpaw_grads, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("team", [True, False])
def test_beta_sums_to_one_over_the_players_present(team):
    policies, players = example(2, 3)
    mask = np.array([True, False, True])[:, None, None] | (np.arange(4) < 2)[None, :, None]
    metrics = call(losses.tpaw, *policies, *players, player_mask=mask, player_weighting=team, **TPAW_HP)[1]
    beta = np.stack([metrics[f"beta_{j}"] for j in range(3)])
    np.testing.assert_allclose(beta.sum(0), 1.0, rtol=1e-6)
    assert (beta[~np.broadcast_to(mask, beta.shape)] == 0).all()
    if not team:
        expected = np.broadcast_to(np.array([1 / 3, 1 / 3, 0.5, 0.5])[:, None], (4, 3))
        np.testing.assert_allclose(beta[0], expected, rtol=1e-6)


@pytest.mark.parametrize(("flow", "kind"), [(False, "logistic"), (True, "logistic"), (True, "exponential")])
def test_absent_players_leave_no_trace(flow, kind):
    policies, players = example(2, 3)
    keep, absent = np.array([0, 2]), np.array([False, True, False])[:, None, None]

    @jax.jit
    def value_and_grads(p, q, mask):
        def total(p, q):
            hp = {"differentiate_weights": flow, "kind": kind, **TPAW_HP}
            loss, metrics = losses.tpaw(*p, *q, player_mask=mask, **hp)
            return loss.sum(), metrics

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(p, q)

    fewer = floats(*(x[keep] for x in players))
    (want, want_metrics), (want_dp, want_dq) = value_and_grads(floats(*policies), fewer, None)
    for rubbish in (0.0, np.nan, np.inf, -np.inf):
        masked = floats(*(np.where(absent, rubbish, x) for x in players))
        (loss, metrics), (dp, dq) = value_and_grads(floats(*policies), masked, ~absent)
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        for got, expected in zip(dp + [x[keep] for x in dq], want_dp + want_dq, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert all((x[1] == 0).all() for x in dq)
        for key, expected in want_metrics.items():
            got = metrics[key.replace("_1", "_2")]
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6, err_msg=key)
        assert all((metrics[key] == 0).all() for key in ("beta_1", "reward_target_1", "reward_generated_1"))


def test_no_player_present_is_a_loss_of_zero():
    policies, players = example(2, 2)
    mask = (np.arange(4) > 0)[None, :, None]
    players = [np.where(mask, x, np.nan) for x in players]

    @jax.jit
    def value_and_grads(x):
        def total(x):
            hp = {"player_mask": mask, "differentiate_weights": True, **TPAW_HP}
            loss, metrics = losses.tpaw(*x, *players, **hp)
            return loss.sum(), (loss, metrics)

        return jax.grad(total, has_aux=True)(x)

    grads, (loss, metrics) = value_and_grads(floats(*policies))
    assert all((x[0] == 0).all() and np.isfinite(x).all() for x in (loss, *grads))
    assert all(np.isfinite(x).all() for x in metrics.values())
    for key in set(metrics) - {"logp_target", "logp_generated", "logp_gap"}:
        assert (metrics[key][0] == 0).all(), key


@pytest.mark.parametrize("noise", [0.0, 1e-6, -1e-6])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_alpha_is_eta_where_the_policy_is_the_player(noise, dtype):
    logp = np.array([-0.01, -1.0, -30.0, -400.0, -9000.0])
    fn = jax.jit(lambda *x: losses.tpaw(*x, **TPAW_HP)[1])
    strict = jax.jit(lambda *x: losses.tpaw(*x, tolerance=0.0, **TPAW_HP)[1])
    with jax.enable_x64(True):
        args = [x.astype(dtype) for x in (logp * (1 + noise), logp - 1, logp[None], logp[None] - 1)]
        metrics = fn(*args)
        assert metrics["alpha"].dtype == dtype
        np.testing.assert_array_equal(metrics["alpha"], 6.0)
        np.testing.assert_array_equal(metrics["boosted"], 1.0)
        # A real gain or loss is not noise, and without tolerance the sign decides.
        for factor, alpha in ((1 - 1e-4, 1.0), (1 + 1e-4, 6.0)):
            np.testing.assert_array_equal(fn((logp * factor).astype(dtype), *args[1:])["alpha"], alpha)
        np.testing.assert_array_equal(strict(*args)["alpha"], 1.0 if noise < 0 else 6.0)


# --- extremes, dtypes, shapes


def test_dpo_starts_at_log_two():
    (c, r), _ = example(2, 0)
    loss, metrics = call(losses.dpo, c, r, c, r, beta=0.1)
    np.testing.assert_allclose(loss, math.log(2.0), rtol=1e-6)
    assert (metrics["accuracy"] == 0).all()


@each_kind
@each_method
def test_finite_at_extreme_log_ratios(name, kind):
    fn, _, num_policies, num_players, hp = CASES[name]
    hp = dict.fromkeys(hp, 1.0) | ({"eta": 6.0, "gamma": 0.5, "differentiate_weights": True} if name == "tpaw" else {})
    extremes = np.meshgrid(*[[-1e4, 0.0, 1e4]] * num_policies)
    policies = floats(*(x.ravel() for x in extremes))
    players = floats(*(np.stack([0 * x, -x, x])[:num_players] for x in policies if num_players))

    def total(x):
        loss, metrics = fn(*x, kind=kind, **hp)
        return loss.sum(), (loss, metrics)

    grads, (loss, metrics) = jax.jit(jax.grad(total, has_aux=True))(policies + players)
    assert all(np.isfinite(x).all() for x in (loss, *grads, *metrics.values()))
    assert max(abs(metrics["margin"])) >= 1e4


def test_exponential_is_smooth_convex_and_falling():
    u = jnp.array([-1e4, -100.0, -31.0, -30.0001, -30.0, -29.0, -1.0, 0.0, 1.0, 1e4])
    zero = jnp.zeros_like(u)

    def total(u):
        loss = losses.spin(u, zero, zero, zero, lam=1.0, kind="exponential")[0]
        return loss.sum(), loss

    slope, loss = jax.grad(total, has_aux=True)(u)
    assert (jnp.diff(loss) < 0).all()
    assert (jnp.diff(slope) >= 0).all()
    np.testing.assert_allclose(slope[:5], -math.exp(30.0), rtol=1e-4)
    np.testing.assert_allclose(loss[5:8], np.exp([29.0, 1.0, 0.0]), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@each_method
def test_half_precision_is_cast_up(name, dtype):
    fn, _, num_policies, num_players, hp = CASES[name]
    policies, players = example(num_policies, num_players)
    args = [jnp.asarray(x, dtype) for x in policies + players]
    loss, metrics = call(fn, *args, **hp)
    want, _ = call(fn, *floats(*args), **hp)
    assert all(x.dtype == jnp.float32 for x in (loss, *metrics.values()))
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    assert losses.sft(args[0], jnp.ones((4, 1), jnp.int32))[0].dtype == jnp.float32


@each_method
def test_jit_and_vmap_agree(name):
    fn, _, num_policies, num_players, hp = CASES[name]
    policies, players = example(num_policies, num_players)
    args = floats(*policies, *players)
    want = {"loss": (out := fn(*args, **hp))[0], **out[1]}
    axes = (0,) * len(policies) + (1,) * len(players)
    vmapped = jax.vmap(lambda *x: fn(*x, **hp), in_axes=axes)
    for loss, metrics in (call(fn, *args, **hp), jax.jit(vmapped)(*args)):
        for key, value in {"loss": loss, **metrics}.items():
            np.testing.assert_allclose(value, want[key], rtol=1e-5, atol=1e-6, err_msg=key)


def test_jit_and_vmap_agree_for_sft():
    args = jnp.array([-6.0, -1.0, -5.0]), jnp.array([2, 1, 3])
    want = losses.sft(*args)[0]
    np.testing.assert_allclose(jax.jit(losses.sft)(*args)[0], want, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(losses.sft)(*args)[0], want, rtol=1e-6)


def test_one_player_may_come_without_its_axis():
    policies, players = example(2, 1)
    flat = [x[0] for x in players]
    for fn, hp in ((losses.spin, {"lam": 0.1}), (losses.dpo, {"beta": 0.1})):
        want = call(fn, *policies, *players, **hp)[0]
        np.testing.assert_array_equal(call(fn, *policies, *flat, **hp)[0], want)


SHAPE_ERRORS = [
    (losses.sft, [(4,), (3,)], "num_tokens"),
    (losses.sft, [(4,), (4, 1)], "num_tokens"),
    (losses.dpo, [(4,), (3,), (4,), (4,)], "policy_rejected"),
    (losses.dpo, [(4,), (4,), (4,), (2, 4)], "reference_rejected"),
    (losses.dpo, [(4,), (4,), (), (4,)], "reference_chosen"),
    (losses.spin, [(4, 1), (4,), (4, 1), (4, 1)], "policy_generated"),
    (losses.spin, [(4,), (4,), (3,), (4,)], "player_target"),
    (losses.spin, [(4,), (4,), (2, 4), (2, 4)], "player_target"),
    (losses.spin, [(4,), (4,), (4,), (1, 1, 4)], "player_generated"),
    (losses.tspin, [(4,), (4,), (4, 1)], "policy_proto"),
    (losses.tspin, [(4,), (4,), (5,)], "policy_proto"),
    (losses.tpaw, [(4,), (4,), (4,), (2, 4)], "player_target"),
    (losses.tpaw, [(4,), (3,), (2, 4), (2, 4)], "policy_generated"),
    (losses.tpaw, [(4,), (4,), (2, 4), (2, 3)], "player_generated"),
    (losses.tpaw, [(4,), (4,), (3, 4), (1, 4)], "player_generated"),
    (losses.tpaw, [(4,), (4,), (0, 4), (0, 4)], "player_target"),
    (losses.tpaw, [(4,), (4,), (2, 4), (2, 4), (4,)], "player_mask"),
    (losses.tpaw, [(4,), (4,), (2, 4), (2, 4), (3, 4)], "player_mask"),
    (losses.tpaw, [(4,), (4,), (1, 4), (1, 4), (3, 4)], "player_mask"),
]
HYPERPARAMETERS = {fn: hp for fn, _, _, _, hp in CASES.values()} | {losses.sft: {}}


@pytest.mark.parametrize(("fn", "shapes", "argument"), SHAPE_ERRORS)
def test_wrong_shapes_are_named(fn, shapes, argument):
    more = {"player_mask": np.ones(shapes.pop(), bool)} if len(shapes) == 5 else {}
    with pytest.raises(ValueError, match=rf"^{argument}: "):
        fn(*(np.zeros(s, np.float32) for s in shapes), **HYPERPARAMETERS[fn], **more)


@each_method
def test_unknown_kind_names_the_choices(name):
    fn, _, num_policies, num_players, hp = CASES[name]
    policies, players = example(num_policies, num_players)
    with pytest.raises(ValueError, match=r"kind: 'linear'.*logistic, hinge, exponential"):
        fn(*policies, *players, kind="linear", **hp)


def test_complex_input_is_refused():
    with pytest.raises(ValueError, match=r"^policy_target: must be real"):
        losses.sft(np.zeros(3, np.complex64), 2)


@st.composite
def broadcast_shapes(draw):
    """Shapes of one rank of which at least one is the full one, and a number of players."""
    full = tuple(draw(st.lists(st.integers(1, 4), max_size=3)))
    shrunk = [tuple(1 if draw(st.booleans()) else n for n in full) for _ in range(3)]
    return full, shrunk, draw(st.integers(1, 3))


@each_method
@settings(max_examples=25, deadline=None)
@given(drawn=broadcast_shapes(), where=st.integers(0, 3), masked=st.booleans())
def test_any_broadcast_shape(name, drawn, where, masked):
    full, shrunk, players = drawn
    fn, _, num_policies, _, hp = CASES[name]
    shapes = shrunk[: num_policies - 1 if num_policies == 3 else 3]
    shapes.insert(where % (len(shapes) + 1), full)
    leading = players if name == "tpaw" else 1
    shapes[num_policies:] = [(leading, *s) for s in shapes[num_policies:]]
    args = [jax.ShapeDtypeStruct(s, dtype) for s, dtype in zip(shapes, [jnp.bfloat16, jnp.float32] * 2, strict=False)]
    hp = hp | ({"player_mask": np.ones((1,) * (len(full) + 1), bool)} if masked and name == "tpaw" else {})
    loss, metrics = jax.eval_shape(lambda *x: fn(*x, **hp), *args)
    assert all(x.shape == full and x.dtype == jnp.float32 for x in (loss, *metrics.values()))
    assert set(metrics) >= PAIR_KEYS
    team = {key for key in metrics if key.startswith("beta_")} - {"beta_entropy"}
    expected = {f"beta_{j}" for j in range(players)} if name == "tpaw" else set()
    assert team == expected


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.data())
def test_tpaw_with_any_mask_matches_the_reference(seed, players, opponents, data):
    policies, team = example(2, players, (2, opponents), seed)
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=2 * players, max_size=2 * players)))
    mask = mask.reshape(players, 2, 1)
    expected = loop(ref_tpaw, policies, team, mask, **TPAW_HP)
    with jax.enable_x64(True):
        got = call(losses.tpaw, *policies, *team, player_mask=mask, **TPAW_HP)
        assert_matches(got, expected, rtol=1e-11, atol=1e-11)


def test_losses_import_jax_and_nothing_of_ours():
    tree = ast.parse(pathlib.Path(losses.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} == {"jax", "typing"}
