"""The table of methods: what each round of each method needs, and its objective against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selfplay_jax import methods
from selfplay_jax.errors import UserError
from selfplay_jax.groups import REJECTED
from selfplay_jax.methods import METHODS, Method, Objective, check_fields, needs_rejected, plan

DPO = {"beta": 0.1, "kind": "logistic"}
SPIN = {"lam": 0.1, "kind": "logistic", "mix_previous": True}
TSPIN = {"alpha": 0.3, "beta": 0.5, "kind": "logistic", "reference": False}
TPAW = {
    "lam": 0.1, "eta": 6.0, "gamma": 0.5, "target_weighting": True, "player_weighting": True,
    "differentiate_weights": False, "kind": "logistic", "tolerance": 1e-6,
}  # fmt: skip
PLAIN_TPAW = {**TPAW, "target_weighting": False, "player_weighting": False}


@pytest.mark.parametrize(
    ("method", "fields", "t", "window", "opponents", "players"),
    [
        ("sft", {}, 0, 3, (), ()),
        ("sft", {}, 4, 3, (), ()),
        ("dpo", DPO, 0, 3, (REJECTED,), (0,)),
        ("dpo", DPO, 4, 3, (REJECTED,), (0,)),
        ("spin", SPIN, 0, 3, (0,), (0,)),
        ("spin", SPIN, 1, 3, (1, 0), (1,)),
        ("spin", SPIN, 5, 1, (5, 4), (5,)),
        ("spin", {**SPIN, "mix_previous": False}, 0, 3, (0,), (0,)),
        ("spin", {**SPIN, "mix_previous": False}, 5, 3, (5,), (5,)),
        ("tspin", TSPIN, 0, 3, (0,), ()),
        ("tspin", TSPIN, 1, 3, (1, 0), ()),
        ("tspin", TSPIN, 5, 1, (5, 0), ()),
        ("tspin", {**TSPIN, "reference": True}, 0, 3, (0,), (0,)),
        ("tspin", {**TSPIN, "reference": True}, 5, 3, (5, 0), (5,)),
        ("tpaw", TPAW, 0, 3, (0,), (0,)),
        ("tpaw", TPAW, 1, 3, (1, 0), (1, 0)),
        ("tpaw", TPAW, 2, 3, (2, 1, 0), (2, 1, 0)),
        ("tpaw", TPAW, 5, 3, (5, 4, 3), (5, 4, 3)),
        ("tpaw", TPAW, 0, 1, (0,), (0,)),
        ("tpaw", TPAW, 2, 1, (2,), (2,)),
        ("tpaw", TPAW, 5, 1, (5,), (5,)),
    ],
)
def test_plan(method, fields, t, window, opponents, players):
    found = plan(method, fields, round_index=t, window=window)
    assert (found.opponents, found.players) == (opponents, players)
    assert found.objective == Objective(method, tuple(sorted(fields.items())), len(opponents))
    assert hash(found.objective) == hash(plan(method, fields, round_index=t, window=window).objective)


def test_only_dpo_asks_for_rejected_answers():
    fields = {"sft": {}, "dpo": DPO, "spin": SPIN, "tspin": TSPIN, "tpaw": TPAW}
    assert [name for name in METHODS if needs_rejected(name, fields[name])] == ["dpo"]


# The losses once more, a comparison at a time, in float64.

ELL = {
    "logistic": lambda u: np.logaddexp(0.0, -u),
    "hinge": lambda u: max(0.0, 1.0 - u),
    "exponential": lambda u: np.exp(-u),
}


def one_comparison(method, fields, policy, players, columns, mean_tokens):
    """policy [K], players [J, K]; columns: of the target and of the responses compared with it."""
    ell = ELL[fields.get("kind", "logistic")]
    y, *others = columns
    if method == "sft":
        return -policy[y] / mean_tokens
    if method == "spin":
        ratio = policy - players[0]
        return ell(fields["lam"] * (ratio[y] - ratio[others[0]]))
    if method == "tspin":
        reward = fields["alpha"] * (policy - players[0] if fields["reference"] else policy)
        beta = fields["beta"] if len(others) == 2 else 0.0
        return ell(reward[y] - reward[others[0]]) + beta * ell(reward[others[0]] - reward[others[-1]])
    rewards = fields["lam"] * (policy - players)  # [J, K]
    margins = rewards[:, y] - rewards[:, others[0]]
    alpha = np.where(rewards[:, y] <= 0, fields["eta"], 1.0) if fields["target_weighting"] else 1.0
    weight = np.exp(-fields["gamma"] * margins) if fields["player_weighting"] else np.ones(len(players))
    weight /= weight.sum()
    return sum(w * ell(u) for w, u in zip(weight, alpha * rewards[:, y] - rewards[:, others[0]], strict=True))


def reference(method, fields, opponents, policy, players, present, mean_tokens):
    """Loss per prompt [B] and which prompts compare something [B]."""
    rows, columns = policy.shape
    per_round = (columns - 1) // max(opponents, 1)
    if method == "sft":
        compared = [(0,)]
    elif method == "tspin":
        compared = [(0, *(1 + r * per_round + s for r in range(opponents))) for s in range(per_round)]
    else:
        compared = [(0, k) for k in range(1, columns)]
    loss, some = np.zeros(rows), np.zeros(rows, bool)
    for b in range(rows):
        costs = [
            one_comparison(method, fields, policy[b], players[:, b], c, mean_tokens)
            for c in compared
            if present[b, list(c)].all()
        ]
        some[b] = bool(costs)
        loss[b] = np.mean(costs) if costs else 0.0
    return loss, some


CASES = [
    ("sft", {}, 0, 0, 0),
    ("spin", SPIN, 1, 1, 1),
    ("spin", {**SPIN, "lam": 2.0, "kind": "hinge"}, 2, 3, 1),
    ("tspin", TSPIN, 1, 2, 0),
    ("tspin", TSPIN, 2, 3, 0),
    ("tspin", {**TSPIN, "kind": "exponential"}, 2, 1, 0),
    ("tspin", {**TSPIN, "reference": True}, 2, 2, 1),
    ("tspin", {**TSPIN, "reference": True}, 1, 2, 1),
    ("tpaw", TPAW, 1, 2, 1),
    ("tpaw", TPAW, 2, 3, 2),
    ("tpaw", {**TPAW, "lam": 1.0, "kind": "exponential"}, 3, 2, 3),
    ("tpaw", PLAIN_TPAW, 3, 1, 3),
]


def draw(opponents, per_round, players, rows=6, seed=0):
    """Log-probabilities, and a mask: row 0 lacks an opponent, row 1 all, row 2 the last round's, row 3 is filler."""
    rng = np.random.default_rng(seed)
    columns = 1 + opponents * per_round
    policy = rng.normal(-9, 2, (rows, columns))
    old = policy + rng.normal(0, 1, (players, rows, columns))
    present = np.ones((rows, columns), bool)
    if columns > 1:
        present[0, 1] = False
        present[1, 1:] = False
        present[2, -per_round:] = False
    present[3] = False
    return policy.astype(np.float32), old.astype(np.float32), present


def call(method, fields, opponents, *args):
    objective = Objective(method, tuple(sorted(fields.items())), opponents)
    return jax.jit(objective)(*args, jnp.float32(4.25))


@pytest.mark.parametrize(("method", "fields", "opponents", "per_round", "players"), CASES)
def test_objective_is_the_papers_loss(method, fields, opponents, per_round, players):
    policy, old, present = draw(opponents, per_round, players)
    present[5, 1:] = np.random.default_rng(1).random(present.shape[1] - 1) < 0.5
    loss, some, metrics = call(method, fields, opponents, policy, old, present)
    wanted, compared = reference(
        method, fields, opponents, policy.astype(np.float64), old.astype(np.float64), present, 4.25
    )
    assert loss.shape == some.shape == (6,) and loss.dtype == jnp.float32
    assert all(value.shape == (6,) for value in metrics.values())
    np.testing.assert_array_equal(some, compared)
    objective = Objective(method, tuple(sorted(fields.items())), opponents)
    np.testing.assert_array_equal(objective.comparisons(present).any(axis=-1), compared)  # what the mean divides by
    np.testing.assert_allclose(loss, wanted, rtol=2e-5, atol=1e-6)
    assert not compared[3] and (method == "sft" or not compared[1])


@pytest.mark.parametrize(("method", "fields", "opponents", "per_round", "players"), CASES)
def test_what_masked_entries_hold_does_not_leak(method, fields, opponents, per_round, players):
    policy, old, present = draw(opponents, per_round, players)
    objective = Objective(method, tuple(sorted(fields.items())), opponents)

    @jax.jit
    def run(policy, old):
        def total(policy, old):
            loss, _, metrics = objective(policy, old, present, jnp.float32(4.25))
            return jnp.sum(loss), metrics

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(policy, old)

    clean, gradients = run(policy, old)
    for junk in (np.nan, np.inf, -np.inf, 1e30):
        dirty = np.where(present, policy, np.float32(junk)), np.where(present, old, np.float32(junk))
        found, found_gradients = run(*dirty)
        jax.tree.map(np.testing.assert_array_equal, found, clean)
        jax.tree.map(np.testing.assert_array_equal, found_gradients, gradients)
    np.testing.assert_array_equal(np.asarray(gradients[0])[~present], 0.0)


def test_a_prompt_with_nothing_to_compare_costs_nothing_and_does_not_count():
    policy, old, present = draw(2, 2, 0)
    present[4, 1:] = [True, False, False, True]  # a generated response and another sample's proto: no triple
    loss, some, metrics = call("tspin", TSPIN, 2, policy, old, present)
    np.testing.assert_array_equal(some, [True, False, False, False, False, True])
    np.testing.assert_array_equal(np.asarray(loss)[~np.asarray(some)], 0.0)
    assert all((np.asarray(m)[~np.asarray(some)] == 0).all() for m in metrics.values())


def test_tpaw_without_its_three_parts_is_spin():
    policy, old, present = draw(1, 3, 1)
    plain = plan("tpaw", {**PLAIN_TPAW, "lam": 0.7}, round_index=3, window=1).objective
    spin = plan("spin", {**SPIN, "lam": 0.7, "mix_previous": False}, round_index=3, window=3).objective

    def run(objective):
        total = lambda p: jnp.sum(objective(p, old, present, jnp.float32(1.0))[0])  # noqa: E731
        return jax.jit(jax.value_and_grad(total))(policy)

    (a, gradient_a), (b, gradient_b) = run(plain), run(spin)
    np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(gradient_a, gradient_b, rtol=1e-5, atol=1e-7)
    assert np.abs(gradient_b).max() > 0.01


def test_round_0_of_tspin_has_no_historical_term():
    policy, old, present = draw(1, 2, 0)
    first = plan("tspin", TSPIN, round_index=0, window=3).objective
    without = plan("tspin", {**TSPIN, "beta": 0.0}, round_index=0, window=3).objective
    loss, *_ = jax.jit(first)(policy, old, present, jnp.float32(1.0))
    np.testing.assert_array_equal(loss, jax.jit(without)(policy, old, present, jnp.float32(1.0))[0])
    margin = TSPIN["alpha"] * (policy[4, :1] - policy[4, 1:])
    np.testing.assert_allclose(loss[4], np.logaddexp(0, -margin).mean(), rtol=1e-5)


@pytest.mark.parametrize("players", [1, 2, 3])
def test_at_the_start_of_a_round_every_target_is_boosted(players):
    """θ = θ_t: P_t(y) = 0, so α_t = η; against players that found y likelier, too."""
    policy, old, present = draw(1, 2, players)
    old[0] = policy
    old[1:] = policy + 1.0
    _, some, metrics = call("tpaw", TPAW, 1, policy, old, present)
    np.testing.assert_array_equal(np.asarray(metrics["alpha"])[some], 6.0)
    np.testing.assert_array_equal(np.asarray(metrics["boosted"])[some], 1.0)


@pytest.mark.parametrize(
    ("method", "fields", "says"),
    [
        ("spn", SPIN, r"config\.method='spn' is not one of sft, dpo, spin, tspin, tpaw"),
        ("spin", {**SPIN, "eta": 6.0}, r"config\.loss\.eta is no field of spin; it has kind, lam, mix_previous"),
        ("sft", {"lam": 1.0}, r"config\.loss\.lam is no field of sft"),
        ("tpaw", {**TPAW, "kind": "hing"}, r"config\.loss\.kind='hing' is not one of logistic, hinge, exponential"),
        ("tspin", {k: v for k, v in TSPIN.items() if k != "beta"}, r"config\.loss\.beta is missing; tspin needs it"),
    ],
)
def test_check_fields(method, fields, says):
    with pytest.raises(UserError, match=says):
        check_fields(method, fields)


def test_check_fields_accepts_what_the_table_says():
    for method, fields in (("sft", {}), ("spin", SPIN), ("tspin", TSPIN), ("tpaw", TPAW)):
        check_fields(method, fields)
        assert METHODS[method].fields == set(fields)


def test_a_new_method_is_one_row(monkeypatch):
    def gap(columns, fields):
        loss = fields["scale"] * (columns.opponents[0] - columns.target)
        return loss, {"logp_gap": -loss}

    row = Method(
        fields=frozenset({"scale"}),
        opponents=lambda fields, t, window: (t,),
        players=lambda fields, t, window: (),
        loss=gap,
    )
    monkeypatch.setitem(methods.METHODS, "toy", row)
    check_fields("toy", {"scale": 2.0})
    made = plan("toy", {"scale": 2.0}, round_index=3, window=2)
    assert made.opponents == (3,) and made.players == () and not needs_rejected("toy", {"scale": 2.0})
    policy, old, present = draw(1, 2, 0)
    loss, some, metrics = jax.jit(made.objective)(policy, old, present, jnp.float32(1.0))
    np.testing.assert_allclose(loss[0], 2.0 * (policy[0, 2] - policy[0, 0]), rtol=1e-6)
    np.testing.assert_allclose(loss[4], 2.0 * (policy[4, 1:].mean() - policy[4, 0]), rtol=1e-5)
    np.testing.assert_allclose(metrics["logp_gap"], -loss)
    np.testing.assert_array_equal(some, [True, False, False, False, True, True])
