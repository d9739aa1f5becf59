"""Training one round: optimizer, train state, the jitted step, and going on where a killed run left off."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from selfplay_jax import distributed, layout, partitioning
from selfplay_jax import metrics as metrics_files
from selfplay_jax.checkpoints import Checkpoints, abstract_like
from selfplay_jax.errors import Stopped, UserError
from selfplay_jax.groups import Array, padding_share
from selfplay_jax.logprobs import response_logps
from selfplay_jax.methods import Objective
from selfplay_jax.metrics import MetricsWriter
from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.progress import progress
from selfplay_jax.table import Batch, Table, batches, schedule

# Checkpoints inside rounds are numbered (round + 1) * STRIDE + step, so that a later one has a larger number.
STRIDE = 10_000_000


class TrainState(NamedTuple):
    """What is trained: parameters and optimizer state of a round, and the steps taken in it (int32 scalar).

    With LoRA `params` are the adapters alone; the base stays outside (`Model.split`).
    """

    params: Params
    opt_state: Any
    step: Array


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a round is trained: the `train` (or `sft`) fields of the config; hashable."""

    epochs: int
    batch_size: int
    accumulate: int
    optimizer: str
    b1: float
    b2: float
    eps: float
    decay: float
    weight_decay: float
    clip_norm: float
    learning_rate: float
    schedule: str
    warmup: float
    checkpoint_every: int

    def learning_rates(self, steps: int) -> np.ndarray:
        """The learning rate of every step of a round, float64 [steps]; linear and cosine would be 0 one step later."""
        warmup = round(self.warmup * steps)
        peak, rest = self.learning_rate, max(steps - warmup, 1)
        decay = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, 0.0, rest),
            "cosine": optax.cosine_decay_schedule(peak, rest),
        }[self.schedule]
        # The first step of a warm-up takes peak / warmup, not 0: a step that moves nothing is a step lost.
        rise = np.arange(1, warmup + 1) / max(warmup, 1) * peak
        return np.concatenate([rise, np.asarray(jax.vmap(decay)(jnp.arange(rest)))])[:steps]

    def transform(self) -> optax.GradientTransformation:
        """The optimizer at learning rate 1: the step multiplies by its rate, so no rate is compiled in."""
        if self.optimizer == "adamw":
            core = optax.adamw(1.0, b1=self.b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay)
        elif self.optimizer == "rmsprop":
            core = optax.rmsprop(1.0, decay=self.decay, eps=self.eps)
            if self.weight_decay:
                core = optax.chain(core, optax.add_decayed_weights(-self.weight_decay))
        else:
            core = optax.adafactor(1.0, weight_decay_rate=self.weight_decay or None)
        return optax.chain(optax.clip_by_global_norm(self.clip_norm), core) if self.clip_norm else core


@dataclasses.dataclass(frozen=True)
class Programs:
    """The jitted pieces of training for one model, objective, settings and mesh.

    init: trained params -> TrainState. step: (state, frozen params, batch, learning rate) -> (state, metrics).
    shardings: those of the TrainState; rows: that of a batch.
    """

    init: Callable[[Params], TrainState]
    step: Callable[[TrainState, Params, Batch, np.float32], tuple[TrainState, dict[str, jax.Array]]]
    shardings: TrainState
    rows: NamedSharding
    abstract: TrainState


def batch_loss(
    model: Model,
    objective: Objective,
    trained: Params,
    frozen: Params,
    batch: Batch,
    mean_tokens: jax.Array,
    count: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The part of a batch's loss that these rows carry: their losses' sum over the whole batch's `count` prompts.

    The parts of microbatches and of devices add up to the batch's loss, metrics too.
    """
    policy = response_logps(model, model.join(trained, frozen), batch.group)
    players = jnp.moveaxis(batch.players, 1, 0)
    loss, compared, metrics = objective(policy, players, batch.present, mean_tokens)
    rows = compared & batch.real

    def share(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(rows, values, 0.0)) / count

    return share(loss), {name: share(values) for name, values in metrics.items()}


def _microbatches(batch: Batch, accumulate: int) -> Batch:
    """[B, ...] -> [M, B / M, ...]."""
    return jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)


def _gradients(
    model: Model, objective: Objective, accumulate: int, specs: Params, trained: Params, frozen: Params, batch: Batch
) -> tuple[Params, dict[str, jax.Array]]:
    """Gradients of a batch's loss, cut as `specs` say, and its metrics; runs on every device's rows (`over_rows`)."""
    # With opponents' responses cut and dropped a prompt may have nothing to compare; the mean is over the others.
    usable = batch.real & jnp.any(objective.comparisons(batch.present), axis=-1)
    tokens = jnp.sum(jnp.where(batch.real, batch.group.response_lengths[:, 0], 0))
    tokens, real, count = partitioning.sum_rows((tokens, jnp.sum(batch.real), jnp.sum(usable)))
    mean_tokens, count = tokens / jnp.maximum(real, 1), jnp.maximum(count, 1).astype(jnp.float32)
    gradient = jax.value_and_grad(functools.partial(batch_loss, model, objective), has_aux=True)
    if accumulate == 1:
        (loss, metrics), grads = gradient(trained, frozen, batch, mean_tokens, count)
    else:
        parts = _microbatches(batch, accumulate)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(gradient, trained, frozen, jax.tree.map(lambda x: x[0], parts), mean_tokens, count),
        )

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(trained, frozen, part, mean_tokens, count)), None

        ((loss, metrics), grads), _ = jax.lax.scan(add, zeros, parts)
    return partitioning.sum_rows(grads, specs), partitioning.sum_rows({**metrics, "loss": loss})


def _step(
    gradients: Callable[[Params, Params, Batch], tuple[Params, dict[str, jax.Array]]],
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Params,
    batch: Batch,
    learning_rate: jax.Array,
) -> tuple[TrainState, dict[str, jax.Array]]:
    grads, metrics = gradients(state.params, frozen, batch)
    loss = metrics["loss"]
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda u: (learning_rate * u).astype(u.dtype), updates)
    moved = TrainState(optax.apply_updates(state.params, updates), opt_state, state.step + 1)
    grad_norm = optax.tree.norm(grads)
    update_norm = optax.tree.norm(updates)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
    # A bad step changes nothing, so that the state to be saved is the last good one.
    kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, state)
    norms = {
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "finite": finite,
    }
    return kept, {**metrics, **norms}


def _state_shardings(abstract: TrainState, params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Optimizer moments lie like their parameters; what has another shape (counts, factored moments) is whole."""
    whole = partitioning.replicated(mesh)
    shapes = jax.tree.map(lambda leaf: leaf.shape, abstract.params, is_leaf=lambda x: hasattr(x, "shape"))
    like = jax.tree.map(lambda s, shape: (s, shape), params, shapes, is_leaf=lambda x: isinstance(x, NamedSharding))
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda leaf, pair: pair[0] if leaf.shape == pair[1] else whole,
        abstract.opt_state,
        like,
        transform_non_params=lambda leaf: whole,
    )
    return TrainState(params, opt_state, whole)


@functools.lru_cache(maxsize=8)
def programs(model: Model, objective: Objective, settings: Settings, mesh: Mesh) -> Programs:
    """Builds (or recalls) the jitted pieces; rounds that differ in nothing else share them."""
    optimizer = settings.transform()

    def init(trained: Params) -> TrainState:
        return TrainState(trained, optimizer.init(trained), jnp.int32(0))

    abstract = jax.eval_shape(init, model.split(model.abstract_params())[0])
    param_shardings, frozen = model.split(model.shardings(mesh))
    shardings = _state_shardings(abstract, param_shardings, optimizer, mesh)
    rows = partitioning.rows(mesh)
    whole = partitioning.replicated(mesh)
    specs = model.split(model.row_specs(mesh))
    gradients = partitioning.over_rows(
        functools.partial(_gradients, model, objective, settings.accumulate, specs[0]),
        mesh,
        in_specs=(*specs, rows.spec),
        out_specs=(specs[0], PartitionSpec()),
    )
    step = functools.partial(_step, gradients, optimizer)
    return Programs(
        init=jax.jit(init, in_shardings=(param_shardings,), out_shardings=shardings, donate_argnums=0),
        step=jax.jit(
            step, in_shardings=(shardings, frozen, rows, whole), out_shardings=(shardings, whole), donate_argnums=0
        ),
        shardings=shardings,
        rows=rows,
        abstract=abstract_like(abstract, shardings),
    )


def train(
    model: Model,
    params: Params,
    table: Table,
    objective: Objective,
    settings: Settings,
    *,
    mesh: Mesh,
    seed: int,
    round_index: int,
    opponents_per_prompt: int,
    checkpoints: Checkpoints,
    directory: epath.Path,
    should_stop: Callable[[], bool] = lambda: False,
) -> Params:
    """Trains a round from `params`, or from the newest state saved inside it; `directory` gets its metrics.

    What is trained of `params` is given away: its buffers are reused or freed, so that one parameter tree is in memory
    at a time.

    Raises:
      Stopped: `should_stop()` said so; the state is saved.
      UserError: the loss is not finite; the state before that step is saved.
    """
    steps = schedule(len(table.prompts), settings.batch_size, settings.epochs, seed=seed, round_index=round_index)
    rates = settings.learning_rates(len(steps))
    parts = programs(model, objective, settings, mesh)
    size = layout.filled(settings.batch_size, mesh, settings.accumulate)
    base = (round_index + 1) * STRIDE

    saved = checkpoints.state_step()
    resumed = saved is not None and base <= saved < base + STRIDE
    start = saved - base if saved is not None and resumed else 0
    trained, frozen = model.split(params)
    own = distributed.own_rows(parts.rows, size)
    loader = batches(table, steps, size=size, per_round=opponents_per_prompt, own=own)
    if resumed:
        jax.tree.map(lambda leaf: leaf.delete(), trained)
        state, position = checkpoints.load_state(base + start, parts.abstract)
        loader.set_state(position)
    else:
        state = parts.init(trained)
    name = "SFT" if round_index < 0 else f"training round {round_index}"
    with (
        partitioning.use_mesh(mesh),
        MetricsWriter(directory, resume_step=start) as writer,
        progress(name, total=len(steps), unit="steps", start=start) as bar,
    ):
        for number in range(start, len(steps)):
            stopping = should_stop()
            if number > start and (stopping or number % settings.checkpoint_every == 0):
                writer.flush()  # before the state: what is resumed from it never lacks rows
                checkpoints.save_state(base + number, state, loader.get_state())
            if stopping:
                raise Stopped
            position = loader.get_state()
            batch = next(loader)
            state, row = _one_step(parts, state, frozen, batch, float(rates[number]))
            if not row.pop("finite"):
                if number > start:
                    writer.flush()
                    checkpoints.save_state(base + number, state, position)
                raise UserError(
                    f"the loss is not finite at step {number + 1} of {name} (loss {row['loss']}, gradient norm "
                    f"{row['grad_norm']}, update norm {row['update_norm']}); the state before that step is saved. "
                    "Lower the learning rate, in a new --workdir."
                )
            writer.write({"kind": "train", "round": round_index, "step": number + 1, "epoch": steps[number][0], **row})
            bar.update_text(f"loss {row['loss']:.4f}")
            bar.advance()
    if start < len(steps):
        checkpoints.save_state(base + len(steps), state, loader.get_state())
    return model.join(state.params, frozen)


def _one_step(
    parts: Programs, state: TrainState, frozen: Params, batch: Batch, rate: float
) -> tuple[TrainState, dict[str, float]]:
    """Takes a step and waits for it; the row of metrics has what the device and the clock say."""
    began = time.perf_counter()
    state, metrics = parts.step(state, frozen, distributed.to_devices(batch, parts.rows), np.float32(rate))
    row = {key: float(value) for key, value in jax.device_get(metrics).items()}
    share = padding_share(batch.group, int(batch.real.sum()))
    tokens = (1.0 - share) * (batch.group.prompt.size + batch.group.responses.size)
    row["learning_rate"] = rate
    row["tokens_per_second"] = tokens / (time.perf_counter() - began)
    row["padding_share"] = share
    return state, row


def summarise(directory: epath.Path) -> dict[str, Any]:
    """A round's metrics in sum: steps, padding_share, and under `train` each metric's mean over the last epoch."""
    rows = [row for row in metrics_files.read(directory / "metrics.jsonl") if row["kind"] == "train"]
    if not rows:
        return {"steps": 0}
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    names = [name for name in rows[-1] if name not in ("kind", "round", "step", "epoch", "time", "padding_share")]
    means = {name: float(np.mean([row[name] for row in last])) for name in names}
    return {
        "steps": rows[-1]["step"],
        "padding_share": float(np.mean([row["padding_share"] for row in rows])),
        "train": {**means, "loss_first": rows[0]["loss"], "loss_last": rows[-1]["loss"]},
    }
