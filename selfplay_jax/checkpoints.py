"""Checkpoints through Orbax: the rolling window of players, and the newest state inside a round.

Players are numbered as in the papers: player 0 is the SFT policy θ_0, round t makes player t + 1. Every save is waited
for: whoever reads a step finds it whole, and a half-written one is never listed. Of several processes all call every
method, each writes its part, and what is there is what the lead sees.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from selfplay_jax import distributed, stores
from selfplay_jax.errors import UserError


@contextlib.contextmanager
def _told(directory: epath.Path) -> Iterator[None]:
    """Turns a full or read-only disk into one sentence; what was saved before stays."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot save a checkpoint under {directory}: {error.strerror or error}.") from error
    except (ValueError, RuntimeError) as error:
        if "RESOURCE_EXHAUSTED" in str(error) or "No space left" in str(error):
            raise UserError(f"cannot save a checkpoint under {directory}: the disk is full.") from error
        raise


class Checkpoints:
    """The checkpoint directory of one run.

    players: params of θ_j at step j; kept are the `window` newest, θ_0, and the best by evaluation.
    state: the train state inside a round; only the newest is kept.
    """

    def __init__(self, directory: epath.PathLike, *, window: int):
        directory = epath.Path(directory)  # whose resolve() would put gs:// below the current directory
        self._directory = directory if stores.is_remote(directory) else directory.resolve()
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(n=window),
                policies.CustomSteps([0]),
                policies.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False),
            ]
        )
        self._players = ocp.CheckpointManager(
            self._directory / "players",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=keep, best_fn=_score, enable_async_checkpointing=False
            ),
        )
        self._state = ocp.CheckpointManager(
            self._directory / "state",
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.LatestN(n=1), enable_async_checkpointing=False
            ),
        )

    def players(self) -> list[int]:
        """The players on disk, oldest first."""
        return distributed.agree(lambda: sorted(self._players.all_steps()))

    def best(self) -> int | None:
        """The player with the best evaluation so far, None where none was evaluated."""

        def find() -> int | None:
            scores = {step: self._players.metrics(step) for step in self.players()}
            rated = [step for step, metrics in scores.items() if metrics]
            return max(rated, key=lambda step: _score(scores[step])) if rated else None

        return distributed.agree(find)

    def save_player(self, index: int, params: Any, *, score: float | None) -> None:
        """Commits θ_index with its evaluation `score` (higher is better; None: not evaluated)."""
        with _told(self._directory):
            metrics = None if score is None else {"score": float(score)}
            self._players.save(index, args=ocp.args.StandardSave(params), metrics=metrics)
            self._players.wait_until_finished()

    def load_player(self, index: int, abstract: Any) -> Any:
        """θ_index, restored straight into the shardings of `abstract` (a tree of ShapeDtypeStructs).

        Raises:
          UserError: the player is not on disk any more.
        """
        if index not in self.players():
            raise UserError(
                f"player {index} is not under {self._directory}/players (it holds {self.players()}); "
                "start the run again in a new workdir."
            )
        return self._players.restore(index, args=ocp.args.StandardRestore(abstract))

    def state_step(self) -> int | None:
        """The key of the newest saved train state, None where there is none."""
        return distributed.agree(self._state.latest_step)

    def save_state(self, key: int, state: Any, position: dict[str, Any]) -> None:
        """Saves the train state under `key`, which must grow; the one before goes once this one is whole.

        `position` is where the batches stand, a JSON object, the same on every process.
        """
        with _told(self._directory):
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), batches=ocp.args.JsonSave(position))
            self._state.save(key, args=args)
            self._state.wait_until_finished()

    def load_state(self, key: int, abstract: Any) -> tuple[Any, dict[str, Any]]:
        """The train state saved under `key`, in the shardings of `abstract`, and where its batches stand."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), batches=ocp.args.JsonRestore())
        saved = self._state.restore(key, args=args)
        return saved["state"], saved["batches"]

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._players.close()
        self._state.close()


def _score(metrics: Any) -> float:
    return float(metrics["score"])


def abstract_like(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of `tree` (arrays or structs) with `shardings`: what a restore needs to know."""
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)
