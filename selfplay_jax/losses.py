"""The losses of self-play fine-tuning: pure functions of log-probabilities.

Every loss takes arrays of response log-probabilities (``log pi(z|x)``: summed over the response's tokens,
in nats) and returns ``(per_example_loss, metrics)``: an array of the broadcast batch shape, and a flat dict
of arrays of that same shape through which no gradient flows.

Shapes. ``policy_*`` have one common rank n and broadcast against each other: a target [B, 1] meets the
responses of several opponents [B, O]. ``player_*`` carry the frozen players on an extra leading axis, rank
n + 1: [J, B, 1] against [J, B, O]. SPIN, DPO and T-SPIN know at most one frozen player: there that axis, of
size 1, may be left out. Ranks are never promoted; what does not fit is a ``ValueError`` that starts with the
argument's name.

Dtypes. All mathematics is in float32: bfloat16 and float16 are cast up first. float64 (under x64) stays so.

Metrics that every method with a pair of responses returns (DPO: target = chosen, generated = rejected):

    reward_target, reward_generated   the method's reward of each response, averaged over the players
    margin                            reward_target - reward_generated
    accuracy                          1 where margin > 0, else 0
    logp_target, logp_generated       log pi(y|x), log pi(y_gen|x) under the policy
    logp_gap                          logp_target - logp_generated
    higher_reward_lower_logp          1 where the reward prefers the target (margin > 0) although the policy
                                      finds it less likely (logp_gap < 0), else 0. Its mean is the share that
                                      T-SPIN's Figure 3 shows; zero by construction without a reference.

With l the convex decreasing loss chosen by ``kind``:

    logistic      l(u) = log(1 + exp(-u))
    hinge         l(u) = max(0, 1 - u)
    exponential   l(u) = exp(-u), continued by its tangent below u = -30: value and gradient stay finite

References: DPO arXiv 2305.18290, SPIN arXiv 2401.01335, T-SPIN arXiv 2601.08198, TPAW arXiv 2605.09922.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

Metrics = dict[str, Array]
Scalar = float | Array

_EXPONENT_CAP = 30.0


def _logistic(u: Array) -> Array:
    return jax.nn.softplus(-u)


def _hinge(u: Array) -> Array:
    return jax.nn.relu(1.0 - u)


def _exponential(u: Array) -> Array:
    # Past the cap this is exp(cap) * (1 + (-u - cap)), the tangent at the cap: finite, convex, still falling.
    exponent = jnp.minimum(-u, _EXPONENT_CAP)
    return jnp.exp(exponent) * (1.0 + (-u - exponent))


_LOSSES = {"logistic": _logistic, "hinge": _hinge, "exponential": _exponential}
LOSS_KINDS: tuple[str, ...] = tuple(_LOSSES)


def _loss(kind: str, u: Array) -> Array:
    if kind not in LOSS_KINDS:
        raise ValueError(f"kind: {kind!r} is not a loss; choose one of {', '.join(LOSS_KINDS)}")
    return _LOSSES[kind](u)


def sft(policy_target: ArrayLike, num_tokens: ArrayLike) -> tuple[Array, Metrics]:
    """Supervised fine-tuning: -log pi(y|x) / num_tokens.

    ``num_tokens`` is the number to divide by, and so chooses the mean. Given the batch's *mean* count of
    target tokens (a scalar), the mean of the returned losses is the token mean over the batch: sum of nll /
    sum of tokens. Given each row's own count, it is the mean over rows of the loss per token. A row whose
    count is 0 costs nothing.

    Args:
      policy_target: [...] float, log pi(y|x) in nats.
      num_tokens: scalar, or [...] of the same rank, broadcasting with ``policy_target``; int or float, >= 0.

    Returns:
      The loss [...] in nats per token, and the metrics ``logp_target`` and ``nll_per_token`` (the loss).

    Raises:
      ValueError: the two do not broadcast or differ in rank.
    """
    arrays = _as_floats(policy_target=policy_target, num_tokens=num_tokens)
    target, count = arrays.values()
    if count.ndim == 0:
        count = jnp.broadcast_to(count, target.shape)
        arrays["num_tokens"] = count
    shape = _batch_shape(arrays, rank=target.ndim)
    real = jnp.broadcast_to(count > 0, shape)
    loss = jnp.where(real, -jnp.where(real, target, 0.0) / jnp.where(real, count, 1.0), 0.0)
    return loss, _finish({"logp_target": target, "nll_per_token": loss}, loss)


def dpo(
    policy_chosen: ArrayLike,
    policy_rejected: ArrayLike,
    reference_chosen: ArrayLike,
    reference_rejected: ArrayLike,
    *,
    beta: Scalar,
    kind: str = "logistic",
) -> tuple[Array, Metrics]:
    """DPO (arXiv 2305.18290, eq. 7): l(beta * (D_policy - D_ref)), D = log pi(chosen|x) - log pi(rejected|x).

    Args:
      policy_chosen, policy_rejected: [...] float, log-probabilities under the policy.
      reference_chosen, reference_rejected: [...] or [1, ...] float, the same under the frozen reference.
      beta: scalar, weight of the implicit reward beta * log(pi/pi_ref).
      kind: one of ``LOSS_KINDS``.

    Returns:
      The loss [...] (log 2 where policy and reference agree), and the pair metrics of the module's docstring.

    Raises:
      ValueError: a shape or rank does not fit, or ``kind`` is unknown.
    """
    policies = {"policy_chosen": policy_chosen, "policy_rejected": policy_rejected}
    references = {"reference_chosen": reference_chosen, "reference_rejected": reference_rejected}
    chosen, rejected, ref_chosen, ref_rejected = _with_one_player(policies, references)
    return _pair(chosen, rejected, beta * (chosen - ref_chosen), beta * (rejected - ref_rejected), kind)


def spin(
    policy_target: ArrayLike,
    policy_generated: ArrayLike,
    player_target: ArrayLike,
    player_generated: ArrayLike,
    *,
    lam: Scalar,
    kind: str = "logistic",
) -> tuple[Array, Metrics]:
    """SPIN (arXiv 2401.01335, eq. 4.7): l(r(y) - r(y')) with r(z) = lam * log(pi(z|x) / pi_t(z|x)).

    Args:
      policy_target, policy_generated: [...] float, log pi of the target y and of the opponent's response y'.
      player_target, player_generated: [...] or [1, ...] float, the same under the opponent theta_t.
      lam: scalar, the paper's lambda.
      kind: one of ``LOSS_KINDS``.

    Returns:
      The loss [...], and the pair metrics of the module's docstring.

    Raises:
      ValueError: a shape or rank does not fit, there is more than one player, or ``kind`` is unknown.
    """
    policies = {"policy_target": policy_target, "policy_generated": policy_generated}
    players = {"player_target": player_target, "player_generated": player_generated}
    target, generated, old_target, old_generated = _with_one_player(policies, players)
    return _pair(target, generated, lam * (target - old_target), lam * (generated - old_generated), kind)


def tspin(
    policy_target: ArrayLike,
    policy_generated: ArrayLike,
    policy_proto: ArrayLike,
    *,
    alpha: Scalar,
    beta: Scalar,
    kind: str = "logistic",
    player_target: ArrayLike | None = None,
    player_generated: ArrayLike | None = None,
    player_proto: ArrayLike | None = None,
) -> tuple[Array, Metrics]:
    """T-SPIN (arXiv 2601.08198): l(r(y) - r(y_t)) + beta * l(r(y_t) - r(y_0)), r(z) = alpha * log pi(z|x).

    With the three ``player_*`` given, the reward is SPIN's, alpha * log(pi(z|x) / pi_t(z|x)): the ablation
    T-SPIN_ref. In round 0 the paper has y_t = y_0 and beta = 0: pass y_t's log-probabilities for both.

    Args:
      policy_target, policy_generated, policy_proto: [...] float, log pi of y, of y_t and of y_0.
      alpha: scalar, scale of the reward.
      beta: scalar, weight of the historical advantage.
      kind: one of ``LOSS_KINDS``.
      player_target, player_generated, player_proto: [...] or [1, ...] float, all three or none.

    Returns:
      The loss [...], and the pair metrics of the module's docstring with ``reward_proto``, ``logp_proto`` and
      ``historical_margin`` = reward_generated - reward_proto.

    Raises:
      ValueError: a shape or rank does not fit, only some ``player_*`` are given, or ``kind`` is unknown.
    """
    policies = {"policy_target": policy_target, "policy_generated": policy_generated}
    policies |= {"policy_proto": policy_proto}
    players = {"player_target": player_target, "player_generated": player_generated}
    players |= {"player_proto": player_proto}
    given = {name: values for name, values in players.items() if values is not None}
    if given and len(given) < len(players):
        missing = next(name for name in players if name not in given)
        raise ValueError(f"{missing}: missing; T-SPIN with a reference needs all of {', '.join(players)}")
    logps = _with_one_player(policies, given)
    rewards = [alpha * logp for logp in logps[:3]]
    if given:
        rewards = [alpha * (logp - old) for logp, old in zip(logps[:3], logps[3:], strict=True)]
    historical = rewards[1] - rewards[2]
    loss = _loss(kind, rewards[0] - rewards[1]) + beta * _loss(kind, historical)
    metrics = _pair_metrics(logps[0], logps[1], rewards[0], rewards[1])
    metrics |= {"reward_proto": rewards[2], "logp_proto": logps[2], "historical_margin": historical}
    return loss, _finish(metrics, loss)


def tpaw(
    policy_target: ArrayLike,
    policy_generated: ArrayLike,
    player_target: ArrayLike,
    player_generated: ArrayLike,
    *,
    lam: Scalar,
    eta: Scalar,
    gamma: Scalar,
    target_weighting: bool = True,
    player_weighting: bool = True,
    differentiate_weights: bool = False,
    player_mask: ArrayLike | None = None,
    kind: str = "logistic",
    tolerance: float = 1e-6,
) -> tuple[Array, Metrics]:
    """TPAW (arXiv 2605.09922): sum_j beta_j * l(alpha_j * P_j(y) - P_j(y_gen)).

    The players' rewards are P_j(z) = lam * log(pi(z|x) / pi_j(z|x)).
    Target weight: alpha_j = eta where P_j(y) <= 0, else 1. At the first step of a round P_t(y) is 0, and
    rounding must not decide: a log ratio up to ``tolerance * (|log pi(y)| + |log pi_j(y)|)`` counts as <= 0.
    Player weight: beta_j = softmax_j(-gamma * m_j) over the players present, with the unweighted margin
    m_j = P_j(y) - P_j(y_gen). Both weights are constants to the gradient unless ``differentiate_weights``:
    then it flows through beta (alpha is piecewise constant). That reaches ``player_*`` alone: the policy
    moves every m_j by the same amount, which the softmax does not see, so its gradient is the same.

    Args:
      policy_target, policy_generated: [...] float, log pi of the target y and of an opponent's response.
      player_target, player_generated: [J, ...] float, the same under the J frozen players.
      lam, eta, gamma: scalars; scale of P_j, weight of targets not yet preferred, sharpness of beta.
      target_weighting: False for alpha_j = 1.
      player_weighting: False for beta_j = 1 / (players present).
      differentiate_weights: whether gradients flow through the weights.
      player_mask: None, or bool [J or 1, ...] broadcasting with ``player_*``: True where the player is
        present. An absent player has beta 0, costs nothing and passes on no gradient, whatever its entries
        hold (NaN included). Where no player is present the loss is 0, without gradient.
      kind: one of ``LOSS_KINDS``.
      tolerance: see above; relative, >= 0.

    Returns:
      The loss [...], and the pair metrics of the module's docstring (rewards are means over the players
      present), with ``alpha`` (mean over the players present), ``boosted`` (share of them that got eta),
      ``beta_entropy`` (nats), and for each index j on the players' axis ``beta_j``, ``reward_target_j`` and
      ``reward_generated_j`` (0 where player j is absent).

    Raises:
      ValueError: a shape or rank does not fit, or ``kind`` is unknown.
    """
    policies = {"policy_target": policy_target, "policy_generated": policy_generated}
    players = {"player_target": player_target, "player_generated": player_generated}
    target, generated, old_target, old_generated, present = _with_team(policies, players, player_mask)
    log_ratio = target - old_target
    reward_target, reward_generated = lam * log_ratio, lam * (generated - old_generated)
    margin = reward_target - reward_generated

    noise = tolerance * (jnp.abs(target) + jnp.abs(old_target))
    boosted = present & (log_ratio <= noise) if target_weighting else jnp.zeros_like(present)
    alpha = jnp.where(boosted, eta, 1.0).astype(margin.dtype)
    beta = _softmax_over_players(-gamma * margin if player_weighting else jnp.zeros_like(margin), present)
    if not differentiate_weights:
        alpha, beta = jax.lax.stop_gradient((alpha, beta))
    loss = jnp.sum(beta * _loss(kind, alpha * reward_target - reward_generated), axis=0)

    logp_target, logp_generated = _as_floats(**policies).values()
    mean_rewards = (_mean_over_players(reward, present) for reward in (reward_target, reward_generated))
    metrics = _pair_metrics(logp_target, logp_generated, *mean_rewards)
    metrics |= {
        "alpha": _mean_over_players(alpha, present),
        "boosted": _mean_over_players(boosted.astype(alpha.dtype), present),
        "beta_entropy": jnp.sum(jax.scipy.special.entr(beta), axis=0),
    }
    for j in range(margin.shape[0]):
        metrics |= {
            f"beta_{j}": beta[j],
            f"reward_target_{j}": reward_target[j],
            f"reward_generated_{j}": reward_generated[j],
        }
    return loss, _finish(metrics, loss)


def _pair(
    logp_target: Array, logp_generated: Array, reward_target: Array, reward_generated: Array, kind: str
) -> tuple[Array, Metrics]:
    """l(reward_target - reward_generated) with the metrics of a pair."""
    loss = _loss(kind, reward_target - reward_generated)
    return loss, _finish(_pair_metrics(logp_target, logp_generated, reward_target, reward_generated), loss)


def _pair_metrics(logp_target: Array, logp_generated: Array, reward_target: Array, reward_generated: Array) -> Metrics:
    margin = reward_target - reward_generated
    logp_gap = logp_target - logp_generated
    return {
        "reward_target": reward_target,
        "reward_generated": reward_generated,
        "margin": margin,
        "accuracy": margin > 0,
        "logp_target": logp_target,
        "logp_generated": logp_generated,
        "logp_gap": logp_gap,
        "higher_reward_lower_logp": (margin > 0) & (logp_gap < 0),
    }


def _finish(metrics: Metrics, loss: Array) -> Metrics:
    """Every metric in the loss's shape and dtype, cut off from the gradient."""
    return {
        name: jax.lax.stop_gradient(jnp.broadcast_to(jnp.asarray(value, loss.dtype), loss.shape))
        for name, value in metrics.items()
    }


def _softmax_over_players(scores: Array, present: Array) -> Array:
    """Softmax over axis 0 among the players present; 0 for the absent, also where all are."""
    lowest = jnp.finfo(scores.dtype).min
    top = jax.lax.stop_gradient(jnp.max(jnp.where(present, scores, lowest), axis=0, keepdims=True))
    # The inner `where` keeps exp finite for absent players, or its gradient would be 0 * inf.
    weights = jnp.where(present, jnp.exp(jnp.where(present, scores - top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=0, keepdims=True)
    return weights / jnp.where(total > 0, total, 1.0)


def _mean_over_players(x: Array, present: Array) -> Array:
    count = jnp.maximum(jnp.sum(present, axis=0), 1).astype(x.dtype)
    return jnp.sum(jnp.where(present, x, 0.0), axis=0) / count


def _as_floats(**named: Any) -> dict[str, Array]:
    """The arguments as arrays of one float dtype, float32 or wider."""
    arrays = {name: jnp.asarray(value) for name, value in named.items()}
    for name, x in arrays.items():
        if jnp.issubdtype(x.dtype, jnp.complexfloating):
            raise ValueError(f"{name}: must be real numbers, got {x.dtype}")
    dtype = jnp.result_type(jnp.float32, *arrays.values())
    return {name: x.astype(dtype) for name, x in arrays.items()}


def _batch_shape(arrays: dict[str, Array], rank: int) -> tuple[int, ...]:
    """The shape that arrays of this rank broadcast to; names the first that does not fit."""
    shape: tuple[int, ...] = (1,) * rank
    for name, x in arrays.items():
        if x.ndim != rank:
            raise ValueError(f"{name}: must have rank {rank} to match the policy's, got shape {x.shape}")
        try:
            shape = jnp.broadcast_shapes(shape, x.shape)
        except ValueError:
            raise ValueError(f"{name}: shape {x.shape} does not broadcast with the others' {shape}") from None
    return shape


def _with_one_player(policies: dict[str, Any], players: dict[str, Any]) -> list[Array]:
    """Arrays of one rank: the policy's, then the single player's without its leading axis."""
    arrays = _as_floats(**policies, **players)
    rank = next(iter(arrays.values())).ndim
    for name in players:
        if arrays[name].ndim == rank + 1:
            if arrays[name].shape[0] != 1:
                raise ValueError(f"{name}: this loss has one player, got {arrays[name].shape[0]} (axis 0)")
            arrays[name] = arrays[name][0]
    _batch_shape(arrays, rank)
    return list(arrays.values())


def _with_team(policies: dict[str, Any], players: dict[str, Any], mask: Any) -> tuple[Array, ...]:
    """The policy's arrays, the players' and the mask, all [J, ...]; absent entries hold 0 and cannot leak."""
    arrays = _as_floats(**policies, **players)
    rank = next(iter(arrays.values())).ndim
    _batch_shape({name: arrays[name] for name in policies}, rank)
    arrays |= {name: arrays[name][None] for name in policies}
    shape = _batch_shape(arrays, rank + 1)
    for name in players:
        if arrays[name].shape[0] != shape[0] or shape[0] == 0:
            raise ValueError(f"{name}: axis 0 must hold the same J >= 1 players, got {arrays[name].shape}")
    present = jnp.ones((1,) * (rank + 1), bool) if mask is None else jnp.asarray(mask).astype(bool)
    shape = _batch_shape(arrays | {"player_mask": present}, rank + 1)
    if shape[0] != arrays[next(iter(players))].shape[0]:
        raise ValueError(f"player_mask: axis 0 must be the number of players or 1, got shape {present.shape}")
    present = jnp.broadcast_to(present, shape)
    return *(jnp.where(present, x, 0.0) for x in arrays.values()), present
