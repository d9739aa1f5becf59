"""The table of methods: which responses stand beside the target, which players judge, which loss compares them.

A method is one row of `METHODS`, one function of losses.py and one file in configs/. Nothing else in the package
knows a method's name. Rounds, checkpoints and players count from 0 (METHOD.md): round t starts from θ_t.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from selfplay_jax import losses
from selfplay_jax.errors import UserError
from selfplay_jax.groups import REJECTED

Fields = Mapping[str, Any]
Metrics = dict[str, jax.Array]


class Columns(NamedTuple):
    """Log-probabilities of a batch of groups by column; O = opponents_per_prompt, J players (0 for a method without).

    target [B, 1]; opponents: one [B, O] per opposing source, newest round first; player_target [J, B, 1];
    player_opponents: one [J, B, O] per opposing source; mean_target_tokens: scalar, over the whole batch.
    """

    target: jax.Array
    opponents: tuple[jax.Array, ...]
    player_target: jax.Array
    player_opponents: tuple[jax.Array, ...]
    mean_target_tokens: jax.Array


def _sft(columns: Columns, fields: Fields) -> tuple[jax.Array, Metrics]:
    return losses.sft(columns.target, columns.mean_target_tokens, **fields)


def _dpo(columns: Columns, fields: Fields) -> tuple[jax.Array, Metrics]:
    chosen, rejected = columns.player_target, columns.player_opponents[0]
    return losses.dpo(columns.target, columns.opponents[0], chosen, rejected, **fields)


def _spin(columns: Columns, fields: Fields) -> tuple[jax.Array, Metrics]:
    lam_and_kind = {key: value for key, value in fields.items() if key != "mix_previous"}
    return losses.spin(
        columns.target,
        jnp.concatenate(columns.opponents, axis=-1),
        columns.player_target,
        jnp.concatenate(columns.player_opponents, axis=-1),
        **lam_and_kind,
    )


def _tspin(columns: Columns, fields: Fields) -> tuple[jax.Array, Metrics]:
    rest = {key: value for key, value in fields.items() if key != "reference"}
    if len(columns.opponents) == 1:  # round 0: y_t is y_0 and the second term is off
        rest["beta"] = 0.0
    if fields["reference"]:  # T-SPIN_ref: rewards are log ratios to θ_t, as SPIN's
        rest["player_target"] = columns.player_target
        rest["player_generated"], rest["player_proto"] = (
            columns.player_opponents[0],
            columns.player_opponents[-1],
        )
    return losses.tspin(columns.target, columns.opponents[0], columns.opponents[-1], **rest)


def _tpaw(columns: Columns, fields: Fields) -> tuple[jax.Array, Metrics]:
    return losses.tpaw(
        columns.target,
        jnp.concatenate(columns.opponents, axis=-1),
        columns.player_target,
        jnp.concatenate(columns.player_opponents, axis=-1),
        **fields,
    )


def _every_opponent(present: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.concatenate(present, axis=-1)


def _all_of_a_triple(present: tuple[jax.Array, ...]) -> jax.Array:
    return jnp.all(jnp.stack(present), axis=0)


def _newest(round_index: int, count: int) -> tuple[int, ...]:
    return tuple(range(round_index, max(round_index - count, -1), -1))


@dataclasses.dataclass(frozen=True)
class Method:
    """One row.

    fields: the loss's own config fields. opponents, players: from (fields, round, window) the sources of the responses
    that oppose (rounds, the newest first, or REJECTED) and the checkpoints that judge. loss: from (columns, fields) the
    loss and metrics per comparison, [B, M]. compared: from the presence of each opponent's responses, [B, O] each, that
    of the M comparisons.
    """

    fields: frozenset[str]
    opponents: Callable[[Fields, int, int], tuple[int, ...]]
    players: Callable[[Fields, int, int], tuple[int, ...]]
    loss: Callable[[Columns, Fields], tuple[jax.Array, Metrics]]
    compared: Callable[[tuple[jax.Array, ...]], jax.Array] = _every_opponent


def _keywords(loss: Callable[..., Any], *own: str) -> frozenset[str]:
    parameters = inspect.signature(loss).parameters.values()
    arrays = {"player_target", "player_generated", "player_proto", "player_mask"}
    return frozenset({p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - arrays | set(own))


METHODS: dict[str, Method] = {
    "sft": Method(
        fields=_keywords(losses.sft),
        opponents=lambda fields, t, window: (),
        players=lambda fields, t, window: (),
        loss=_sft,
    ),
    "dpo": Method(
        fields=_keywords(losses.dpo),
        opponents=lambda fields, t, window: (REJECTED,),
        players=lambda fields, t, window: (0,),
        loss=_dpo,
    ),
    "spin": Method(
        fields=_keywords(losses.spin, "mix_previous"),
        opponents=lambda fields, t, window: _newest(t, 2 if fields["mix_previous"] else 1),
        players=lambda fields, t, window: (t,),
        loss=_spin,
    ),
    "tspin": Method(
        fields=_keywords(losses.tspin, "reference"),
        opponents=lambda fields, t, window: (t, 0) if t > 0 else (0,),
        players=lambda fields, t, window: (t,) if fields["reference"] else (),
        loss=_tspin,
        compared=_all_of_a_triple,
    ),
    "tpaw": Method(
        fields=_keywords(losses.tpaw),
        opponents=lambda fields, t, window: _newest(t, window),
        players=lambda fields, t, window: _newest(t, window),
        loss=_tpaw,
    ),
}


WARM_UP = "sft"  # the row that makes θ_0 of the model that was brought


@dataclasses.dataclass(frozen=True)
class Objective:
    """A method with its fields, for a number of opposing rounds: hashable, so that a step is compiled once for it."""

    method: str
    fields: tuple[tuple[str, Any], ...]
    opponents: int

    def __call__(
        self,
        policy: jax.Array,
        players: jax.Array,
        present: jax.Array,
        mean_target_tokens: jax.Array,
    ) -> tuple[jax.Array, jax.Array, Metrics]:
        """The loss per prompt, its opponents averaged.

        Args:
          policy: [B, 1 + opponents * O] log-probabilities, the target's column first.
          players: [J, B, 1 + opponents * O], the same under the frozen players.
          present: bool [B, 1 + opponents * O], which responses are there and to be trained on.
          mean_target_tokens: scalar, the mean length of the batch's targets.
        Returns:
          loss [B] (0 for a prompt with nothing to compare), bool [B] whether there was something, metrics [B] each.
        """
        # A response that is not there passes nothing on, not even as 0 * inf in a gradient.
        policy, players = jnp.where(present, policy, 0.0), jnp.where(present[None], players, 0.0)
        target, *opponents = self._split(policy)
        player_target, *player_opponents = self._split(players)
        loss, metrics = METHODS[self.method].loss(
            Columns(target, tuple(opponents), player_target, tuple(player_opponents), mean_target_tokens),
            dict(self.fields),
        )
        compared = self.comparisons(present)
        return (
            *masked_mean(loss, compared),
            {name: masked_mean(m, compared)[0] for name, m in metrics.items()},
        )

    def comparisons(self, present: jax.Array) -> jax.Array:
        """From bool [B, 1 + opponents * O], which of a prompt's M comparisons can be made, bool [B, M]."""
        target, *opponents = self._split(present)
        return target & METHODS[self.method].compared(tuple(opponents)) if opponents else target

    def _split(self, columns: jax.Array) -> list[jax.Array]:
        """[..., 1 + opponents * O] -> the target's column and those of each opposing round."""
        width = (columns.shape[-1] - 1) // max(self.opponents, 1)
        return jnp.split(columns, [1 + i * width for i in range(self.opponents)], axis=-1)


def masked_mean(values: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Means over the last axis where `mask`, [B], and whether there was anything to average, bool [B]."""
    count = jnp.sum(mask, axis=-1)
    # `where` on the values, not a product: a masked loss costs nothing even where it is not finite.
    return jnp.sum(jnp.where(mask, values, 0.0), axis=-1) / jnp.maximum(count, 1), count > 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one round of one method needs: opposing sources, judging players, and the objective."""

    opponents: tuple[int, ...]
    players: tuple[int, ...]
    objective: Objective


def check_fields(method: str, fields: Fields) -> None:
    """Raises a UserError for an unknown method, or for loss fields that its row does not have or lacks."""
    if method not in METHODS:
        raise UserError(f"config.method={method!r} is not one of {', '.join(METHODS)}.")
    known = METHODS[method].fields
    for name in fields:
        if name not in known:
            raise UserError(f"config.loss.{name} is no field of {method}; it has {', '.join(sorted(known))}.")
    for name in sorted(known - set(fields)):
        raise UserError(f"config.loss.{name} is missing; {method} needs it.")
    kind = fields.get("kind", losses.LOSS_KINDS[0])
    if kind not in losses.LOSS_KINDS:
        raise UserError(f"config.loss.kind={kind!r} is not one of {', '.join(losses.LOSS_KINDS)}.")


def plan(method: str, fields: Fields, *, round_index: int, window: int) -> Plan:
    """The plan of `method` for round `round_index` with N_max = `window`."""
    row = METHODS[method]
    opponents = row.opponents(fields, round_index, window)
    return Plan(
        opponents=opponents,
        players=row.players(fields, round_index, window),
        objective=Objective(method, tuple(sorted(fields.items())), len(opponents)),
    )


def needs_rejected(method: str, fields: Fields) -> bool:
    """Whether the method compares with the dispreferred answers of preference data."""
    return REJECTED in METHODS[method].opponents(fields, 0, 1)
