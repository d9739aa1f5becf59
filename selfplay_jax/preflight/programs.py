"""The programs that a game runs, ready to be compiled for devices that are not there: its own, on shapes alone."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from selfplay_jax import config as configs
from selfplay_jax import layout, methods, partitioning, scoring, train
from selfplay_jax.checkpoints import abstract_like
from selfplay_jax.errors import UserError
from selfplay_jax.groups import TARGET, Group, bucket
from selfplay_jax.models import Model, ModelConfig, lora, splash
from selfplay_jax.preflight import flops
from selfplay_jax.sampling import slots as device
from selfplay_jax.sampling.filters import SamplingFilter
from selfplay_jax.sampling.generate import _programs, _slot_shardings
from selfplay_jax.sampling.generate import sizes as slot_sizes
from selfplay_jax.table import Batch

NAMES = ("train", "score", "fill", "decode")


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted program with abstract arguments.

    holds: bytes per device of the arguments, by what they are. beside: bytes per device that lie in memory at the same
    time without being arguments. mesh: where it runs; copies: how many such run beside each other, each on devices of
    its own (sampling, a host each). rows: prompts or slots of one run. tokens: their token positions, padding included
    (one step of decoding: one per slot). model_flops: matrix products that the mathematics asks for, all devices
    together, without what is computed again to save memory or for rows that only fill a batch up.
    """

    name: str
    jitted: Any
    arguments: tuple[Any, ...]
    holds: dict[str, float]
    beside: dict[str, float]
    mesh: Mesh
    copies: int
    rows: int
    tokens: int
    model_flops: Callable[[], float]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Padded sizes of a steady round's batches, from the config: the largest that the run can meet."""

    prompt: int
    response: int
    columns: int  # responses beside each other in a training group
    players: int
    score_columns: int
    passes: tuple[tuple[int, int], ...]  # (player, responses per prompt) that the round scores


def steady_round(config: Any) -> int:
    """The first round from which every later one looks alike."""
    return max(min(config.rounds, config.window) - 1, 0)


def sizes(config: Any) -> Sizes:
    """The sizes of the steady round of a config.

    Which scores a round computes is found as the game finds it: those that no earlier round has computed.
    """
    t = steady_round(config)
    plan = methods.plan(config.method, config.loss, round_index=t, window=config.window)
    computed: set[tuple[int, int]] = set()
    for earlier in range(t):
        before = methods.plan(config.method, config.loss, round_index=earlier, window=config.window)
        computed |= {(player, source) for player in before.players for source in (TARGET, *before.opponents)}

    def width(source: int) -> int:
        return config.samples_per_prompt if source >= 0 else 1

    passes = []
    for player in plan.players:
        columns = sum(width(s) for s in (TARGET, *plan.opponents) if (player, s) not in computed)
        passes += [(player, columns)] if columns else []
    taken = [min(config.opponents_per_prompt, width(source)) for source in plan.opponents]
    longest = config.data.max_response_tokens
    if any(source >= 0 for source in plan.opponents):
        longest = max(longest, config.sampling.max_new_tokens)
    return Sizes(
        prompt=bucket(config.data.max_prompt_tokens),
        response=bucket(longest),
        columns=1 + sum(taken),
        players=len(plan.players),
        score_columns=min(max((columns for _, columns in passes), default=0), scoring._MOST_COLUMNS),
        passes=tuple(passes),
    )


def samples(config: Any) -> bool:
    """Whether the steady round samples responses."""
    t = steady_round(config)
    return t in methods.plan(config.method, config.loss, round_index=t, window=config.window).opponents


def names(config: Any) -> list[str]:
    """The programs that the config's game runs, in the order of a round's phases but training first."""
    found = ["train"]
    if sizes(config).passes:
        found.append("score")
    return found + (["fill", "decode"] if samples(config) else [])


def make_model(config: Any, shape: ModelConfig) -> Model:
    """The model as `game.set_up` makes it on TPUs."""
    fields = {name: value for name, value in config.model.items() if name != "path"}
    fields["attention"] = splash.resolve(fields["attention"], "tpu")
    return Model(shape, **fields, lora=lora.of_config(config.lora))


def build(config: Any, shape: ModelConfig, mesh: Mesh, name: str, host: Mesh | None = None) -> Program:
    """One program of the config's game on `mesh`; nothing is computed and nothing allocated.

    `host` is a mesh of one host's devices, where each host samples by itself (see `samples_alone`).

    Raises:
      UserError: the mesh cannot hold the batch or the model.
    """
    model = make_model(config, shape)
    config = configs.of_round(config, steady_round(config))
    if name in ("fill", "decode"):
        return (_fill if name == "fill" else _decode)(config, model, mesh, host)
    return (_train if name == "train" else _score)(config, model, mesh)


def samples_alone(config: Any, mesh: Mesh) -> bool:
    """Whether each host samples its prompts on its own devices: unless the weights or `tensor` lie across hosts."""
    hosts = {device.process_index for device in mesh.devices.flat}
    rows = mesh.devices.reshape(-1, mesh.devices.shape[-1])
    across = any(len({device.process_index for device in row}) > 1 for row in rows)
    return len(hosts) > 1 and not across and not config.sampling.sharded_weights


def _train(config: Any, model: Model, mesh: Mesh) -> Program:
    settings = train.Settings(**config.train.to_dict())
    plan = methods.plan(config.method, config.loss, round_index=steady_round(config), window=config.window)
    rows, of = settings.batch_size, sizes(config)
    filled = layout.filled(rows, mesh, settings.accumulate)
    batch = _batch(of, filled, mesh)
    _, frozen = model.split(_params(model, mesh, partitioning.RULES))

    def arguments(parts: train.Programs) -> tuple[Any, ...]:
        return parts.abstract, frozen, batch, jax.ShapeDtypeStruct((), jnp.float32)

    def model_flops() -> float:
        bare = _bare(model)
        step = train.programs(bare, plan.objective, settings, mesh)
        # The backward pass computes each chunk's logits again, whatever `remat` says.
        again = 2.0 * filled * of.columns * of.response * model.config.hidden_size * model.config.vocab_size
        return (count(step.step, arguments(step), mesh).total - again) * rows / filled

    parts = train.programs(model, plan.objective, settings, mesh)
    holds = {
        "parameters": held(parts.abstract.params),
        "optimizer": held(parts.abstract.opt_state),
        "batch": held(batch),
    }
    if frozen:
        holds["frozen base"] = held(frozen)
    tokens = rows * (of.prompt + of.columns * of.response)
    return Program("train", parts.step, arguments(parts), holds, {}, mesh, 1, rows, tokens, model_flops)


def _score(config: Any, model: Model, mesh: Mesh) -> Program:
    of, shards = sizes(config), partitioning.data_shards(mesh)
    rows = math.ceil(config.scoring.batch_size / shards) * shards
    params = _params(model, mesh, partitioning.RULES)
    batch = _batch(dataclasses.replace(of, columns=of.score_columns), rows, mesh)
    program = scoring._score_program(model, mesh)
    # The policy stays in memory while another player is restored and scores; a LoRA base is shared by both.
    beside = {"the policy, while another player scores": held(model.split(params)[0])} if len(of.passes) > 1 else {}
    return Program(
        "score", program, (params, batch.group), {"parameters": held(params), "batch": held(batch.group)}, beside,
        mesh, 1, rows, rows * (of.prompt + of.score_columns * of.response),
        lambda: count(scoring._score_program(_bare(model), mesh), (params, batch.group), mesh).total,
    )  # fmt: skip


def _sampling(config: Any, model: Model, trained: Mesh, mesh: Mesh) -> tuple[Any, Any, int, Any, dict[str, float]]:
    """(the decoding parameters, slots, prompts that enter together, programs, what lies beside them in memory)."""
    settings = config.sampling
    slots, width, columns = slot_sizes(settings.slots, config.data.max_prompt_tokens, settings.max_new_tokens, mesh)
    plain = dataclasses.replace(model, lora=None)
    if not settings.sharded_weights:
        plain = dataclasses.replace(plain, param_dtype=model.compute_dtype)
    rules = "RULES" if settings.sharded_weights else "DECODE_RULES"
    params = _params(plain, mesh, getattr(partitioning, rules))
    choose = SamplingFilter(settings.temperature, settings.top_k, settings.top_p)
    stops = tuple(model.config.stop_ids)
    programs = _programs(plain, choose, stops, slots, columns, settings.max_new_tokens, mesh, rules)
    empty = jax.eval_shape(functools.partial(device.empty, plain, slots, columns, settings.max_new_tokens))
    state = abstract_like(empty, _slot_shardings(empty, mesh))
    beside = {}
    if model.lora is not None or not settings.sharded_weights:
        beside["the policy in the training layout"] = held(_params(model, trained, partitioning.RULES))
    return params, state, width, programs, beside


def _copies(mesh: Mesh, host: Mesh | None) -> int:
    return 1 if host is None else mesh.size // host.size


def _decode(config: Any, model: Model, mesh: Mesh, host: Mesh | None) -> Program:
    here = host or mesh
    params, state, _, programs, beside = _sampling(config, model, mesh, here)
    arguments = (params, state, jax.ShapeDtypeStruct((), jnp.int32), None)
    slots = state.busy.shape[0]
    return Program(
        "decode", programs.decode, arguments, _sampling_holds(params, state), beside,
        here, _copies(mesh, host), slots, slots, lambda: count(programs.decode, arguments, here).total,
    )  # fmt: skip


def _fill(config: Any, model: Model, mesh: Mesh, host: Mesh | None) -> Program:
    here = host or mesh
    params, state, width, programs, beside = _sampling(config, model, mesh, here)
    slots, prompt = state.busy.shape[0], sizes(config).prompt
    integers = jax.ShapeDtypeStruct((width,), jnp.int32)
    refill = device.Refill(
        source=jax.ShapeDtypeStruct((slots,), jnp.int32),
        prompts=jax.ShapeDtypeStruct((width, prompt), jnp.int32),
        lengths=integers,
        keys=jax.eval_shape(lambda: jax.random.split(jax.random.key(0), width)),
    )
    arguments = (params, state, refill)
    return Program(
        "fill", programs.fill, arguments, _sampling_holds(params, state), beside,
        here, _copies(mesh, host), width, width * prompt, lambda: count(programs.fill, arguments, here).total,
    )  # fmt: skip


def _sampling_holds(params: Any, state: Any) -> dict[str, float]:
    return {
        "parameters": held(params),
        "cache": held(state.cache),
        "slots": held(state._replace(cache=None)),
    }


def _batch(of: Sizes, rows: int, mesh: Mesh) -> Batch:
    sharding = partitioning.rows(mesh)

    def array(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding)

    return Batch(
        Group(array(of.prompt), array(), array(of.columns, of.response), array(of.columns)),
        players=array(of.players, of.columns, dtype=jnp.float32),
        present=array(of.columns, dtype=jnp.bool_),
        real=array(dtype=jnp.bool_),
    )


def _params(model: Model, mesh: Mesh, rules: partitioning.Rules) -> Any:
    return abstract_like(model.abstract_params(), model.shardings(mesh, rules))


def _bare(model: Model) -> Model:
    """The model that computes nothing twice: a fused attention kernel recomputes its scores on the way back."""
    return dataclasses.replace(model, remat="none", attention="plain")


def count(jitted: Any, arguments: tuple[Any, ...], mesh: Mesh) -> flops.Flops:
    """The matrix products of a program."""
    with partitioning.use_mesh(mesh):
        return flops.count(jitted.trace(*arguments).jaxpr)


def held(tree: Any) -> float:
    """Bytes that one device holds of a tree of abstract arrays with shardings, without the device's own padding."""
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
        total += math.prod(shape) * leaf.dtype.itemsize
    return total


def check(config: Any, names_wanted: list[str]) -> None:
    """Raises a UserError for a program that the config's game does not run."""
    there = names(config)
    for name in names_wanted:
        if name not in NAMES:
            raise UserError(f"--programs={name} is not one of {', '.join(NAMES)}.")
        if name not in there:
            raise UserError(f"--programs={name}: {config.method} does not run it; it runs {', '.join(there)}.")
