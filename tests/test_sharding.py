"""What travels between devices: read from the optimised programs of a training step and of scoring."""

import dataclasses
import functools
import importlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import PLAIN, mesh_of
from toy_training import SETTINGS, spin

from selfplay_jax import partitioning
from selfplay_jax.groups import Group
from selfplay_jax.logprobs import by_rows, response_logps
from selfplay_jax.models.decoder import Model
from selfplay_jax.preflight.hlo import replica_groups
from selfplay_jax.sampling import SamplingFilter
from selfplay_jax.sampling.slots import Refill
from selfplay_jax.table import Batch
from selfplay_jax.train import programs

generate = importlib.import_module("selfplay_jax.sampling.generate")  # the package's name `generate` is the function

LAYERS, HIDDEN, VOCAB = 5, 48, 112  # sizes that name their dimension: no other is 5, 48 or 112
CONFIG = dataclasses.replace(
    PLAIN, num_layers=LAYERS, hidden_size=HIDDEN, vocab_size=VOCAB, intermediate_size=80, num_kv_heads=4, head_dim=6
)
MODEL = Model(CONFIG, remat="full")
ROWS, PROMPT, COLUMNS, LENGTH = 16, 8, 3, 8


def batch(players: int = 1) -> Batch:
    tokens = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    group = Group(tokens((ROWS, PROMPT)), tokens((ROWS,)), tokens((ROWS, COLUMNS, LENGTH)), tokens((ROWS, COLUMNS)))
    flags = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bool_)
    scores = jax.ShapeDtypeStruct((ROWS, players, COLUMNS), jnp.float32)
    return Batch(group, scores, flags((ROWS, COLUMNS)), flags((ROWS,)))


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of an optimised program: shapes of its results, the devices that take part together."""

    kind: str
    shapes: list[tuple[int, ...]]
    groups: frozenset[frozenset[int]]
    computation: str


def collectives(text: str, devices: int) -> list[Collective]:
    """Those of an optimised program's text; "ENTRY" is the computation outside all loops."""
    found, computation = [], ""
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if header:
            computation = "ENTRY" if header.group(1) else header.group(2)
        call = re.search(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", line)
        if call:
            shapes = [tuple(map(int, dims.split(","))) for dims in re.findall(r"\w+\[([\d,]+)\]", call.group(1))]
            found.append(Collective(call.group(2), shapes, _groups(line, devices), computation))
    return found


def _groups(line: str, devices: int) -> frozenset[frozenset[int]]:
    assert re.search(r"replica_groups=(\{\{|\[|mesh\[)", line), line
    return frozenset(map(frozenset, replica_groups(line, devices)))


def along(mesh: jax.sharding.Mesh, *axes: str) -> frozenset[frozenset[int]]:
    """The groups of devices that differ in `axes` alone."""
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    kept = [i for i, name in enumerate(mesh.axis_names) if name not in axes]
    moved = np.moveaxis(ids, kept, range(len(kept)))
    return frozenset(map(frozenset, moved.reshape(-1, int(np.prod([mesh.shape[axis] for axis in axes]))).tolist()))


@functools.cache
def step_collectives(shape: tuple[int, ...], accumulate: int = 1) -> list[Collective]:
    mesh = mesh_of(*shape)
    parts = programs(MODEL, spin(), dataclasses.replace(SETTINGS, accumulate=accumulate), mesh)
    text = parts.step.lower(parts.abstract, {}, batch(), jax.ShapeDtypeStruct((), jnp.float32)).compile().as_text()
    return collectives(text, 8)


# What a device holds of a layer's seven projections and of embedding and head, by mesh.
def local_weights(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    fsdp, tensor = shape[-2:]
    width, heads, mlp = HIDDEN // fsdp, 4 // tensor, 80 // tensor
    return [(width, heads, 6)] * 3 + [(heads, 6, width)] + [(width, mlp)] * 2 + [(mlp, width)]


def size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


@pytest.mark.parametrize(
    ("shape", "accumulate"), [((8, 1), 1), ((4, 2), 1), ((4, 2), 2), ((2, 4), 1), ((2, 2, 2), 1)], ids=str
)
def test_a_step_gathers_a_layer_at_a_time_and_scatters_its_gradients(shape, accumulate):
    mesh = mesh_of(*shape)
    found = step_collectives(shape, accumulate)
    over_fsdp = along(mesh, "fsdp")
    # No stacked parameter is gathered: nothing that is gathered has the layers' dimension, and outside loops it is
    # tokens and the output projection.
    gathered = [c for c in found if c.kind == "all-gather"]
    assert gathered and not [c for c in gathered for s in c.shapes if LAYERS in s]
    outside = {s for c in gathered if c.computation == "ENTRY" for s in c.shapes if size(s) > ROWS * COLUMNS * LENGTH}
    assert outside <= {(HIDDEN, VOCAB // shape[-1]), (VOCAB // shape[-1], HIDDEN)}
    assert all(c.groups == over_fsdp for c in gathered), "weights and tokens travel along fsdp alone"
    # Every projection's gradient is scattered where it arises, within the loop; the output projection's after it.
    scattered = sorted(s for c in found if c.kind == "reduce-scatter" and c.groups == over_fsdp for s in c.shapes)
    head = (HIDDEN // shape[-2], VOCAB // shape[-1])
    squeezed = [tuple(n for n in s if n != 1) for s in [*local_weights(shape), head]]
    assert sorted(tuple(n for n in s if n != 1) for s in scattered) == sorted(squeezed)
    # All-reduces over the data axes carry no weight's gradient, but between replicas those of what a device holds.
    smallest = min(map(size, local_weights(shape))) * shape[-2]
    for c in found:
        if c.kind == "all-reduce" and len(next(iter(c.groups))) > 1 and c.groups not in (
            along(mesh, "tensor"), along(mesh, "replica"),
        ):  # fmt: skip
            assert all(size(s) < smallest for s in c.shapes), c
    if len(shape) == 3:
        between = [s for c in found if c.kind == "all-reduce" and c.groups == along(mesh, "replica") for s in c.shapes]
        stacked = [(LAYERS, *s) for s in local_weights(shape)]
        assert {s for s in stacked if s not in between} == set(), "summed once a step, stacked, a device's part"
        assert all(c.computation == "ENTRY" for c in found if c.groups == along(mesh, "replica"))


def test_scoring_gathers_a_layer_at_a_time():
    mesh = mesh_of(4, 2)
    program = by_rows(MODEL, mesh, response_logps)
    found = collectives(program.lower(MODEL.abstract_params(), batch().group).compile().as_text(), 8)
    gathered = [s for c in found if c.kind == "all-gather" for s in c.shapes]
    assert (HIDDEN, 40) in gathered and not [s for s in gathered if LAYERS in s]


def test_gradients_are_summed_in_float32_whatever_the_compute_dtype():
    """Eight devices' parts, one large and seven small: a bfloat16 sum would lose the small ones."""
    mesh, spec = mesh_of(8, 1), jax.sharding.PartitionSpec("fsdp")
    parts = jnp.array([256.0] + [0.5] * 7)

    def gradient(weight, part):
        def loss(w):
            whole = partitioning.unshard(w, ("embed",), {"embed": 8}, jnp.bfloat16)
            return jnp.sum(whole.astype(jnp.float32) * part)

        return jax.grad(loss)(weight)

    run = partitioning.over_rows(gradient, mesh, (spec, spec), spec)
    np.testing.assert_array_equal(jax.jit(run)(jnp.zeros(8), parts), np.full(8, 259.5))
    assert jnp.bfloat16(256) + jnp.bfloat16(0.5) == 256  # the test can fail


def test_a_step_that_a_mesh_does_not_divide_computes_the_same():
    """48 hidden units on a mesh whose fsdp is 5: they stay whole, their gradients are summed."""
    devices = jax.devices()[:5]
    config = dataclasses.replace(PLAIN, hidden_size=12, num_layers=1)
    model = Model(config)
    params = model.init(jax.random.key(0))
    rng = np.random.default_rng(0)
    group = Group(
        rng.integers(0, 40, (5, 8), np.int32), np.full(5, 7, np.int32),
        rng.integers(0, 40, (5, 2, 8), np.int32), np.full((5, 2), 8, np.int32),
    )  # fmt: skip
    one = by_rows(model, partitioning.make_mesh(1, 1, devices[:1]), response_logps)(params, group)
    five = by_rows(model, partitioning.make_mesh(5, 1, devices), response_logps)(params, group)
    np.testing.assert_allclose(five, one, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 2), (2, 4)], ids=str)
def test_decoding_moves_neither_weights_nor_the_cache(shape):
    """Weights whole over fsdp: prefill and decode send activations along tensor, between slots only how many are busy.

    With four tensor devices and two key/value heads the cache is cut over its columns, and stays so.
    """
    mesh, slots, columns = mesh_of(*shape), 16, 56
    model = Model(dataclasses.replace(CONFIG, num_kv_heads=2))
    parts = generate._programs(model, SamplingFilter(), (1,), slots, columns, 24, mesh)
    state = jax.eval_shape(parts.empty)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), slots))
    tokens = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    refill = Refill(tokens((slots,)), tokens((slots, 32)), tokens((slots,)), keys)
    params = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        model.abstract_params(),
        model.shardings(mesh, partitioning.DECODE_RULES),
    )
    local = LAYERS * slots // shape[0] * 2 * columns * 6 // shape[1]  # a device's part of the cache's keys
    with partitioning.use_mesh(mesh):
        programs = [parts.fill.lower(params, state, refill), parts.decode.lower(params, state, np.int32(4), None)]
    prompts = slots // shape[0] * 2 * 32 * 6  # a layer's keys of the prompts that a device prefills
    for program, most in zip(programs, [prompts, local // LAYERS - 1], strict=True):
        for c in collectives(program.compile().as_text(), 8):
            scalars = all(size(s) == 1 for s in c.shapes)
            assert scalars or all(any(group <= row for row in along(mesh, "tensor")) for group in c.groups), c
            assert all(size(s) <= most for s in c.shapes if s[-1] == 6), c
