"""What preflight compiles, its flops, and how it reads compiled programs: against hand counts and real arrays."""

import dataclasses
import json
import math
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import PLAIN

from selfplay_jax import partitioning
from selfplay_jax.errors import UserError
from selfplay_jax.main import read_flags
from selfplay_jax.models.decoder import Model
from selfplay_jax.preflight import flops, hlo, programs, shapes

ROOT = pathlib.Path(__file__).parents[1]


def config_of(*flags: str, file: str = "tpaw", preset: str = "demo") -> Any:
    return read_flags([f"--config={ROOT}/configs/{file}.py:{preset}", *flags])[0]


# Published parameter counts.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-1.5b", 1_543_714_304),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("mistral-7b", 7_241_732_096),
    ],
)
def test_known_shapes(name: str, parameters: int) -> None:
    leaves = jax.tree.leaves(Model(shapes.SHAPES[name]).abstract_params())
    assert sum(math.prod(leaf.shape) for leaf in leaves) == parameters


def test_where_a_shape_comes_from(tmp_path: pathlib.Path) -> None:
    config = config_of(preset="ultrachat_llama3.1_8b")
    assert shapes.find(config)[0] == shapes.SHAPES["llama-3.1-8b"]
    assert shapes.find(config_of(preset="ultrachat_zephyr_7b"))[0] == shapes.SHAPES["mistral-7b"]
    assert shapes.find(config_of(preset="gsm8k_qwen2.5_1.5b"))[0] == shapes.SHAPES["qwen2.5-1.5b"]
    fields = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 11, "hidden_size": 8,
        "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    shape, source = shapes.find(config, str(tmp_path))
    assert (shape.num_layers, shape.vocab_size) == (3, 11)
    assert source == f"{tmp_path}/config.json"
    with pytest.raises(UserError, match="give --model=DIR"):
        shapes.find(config, "runs/nothing/hf/final")


# What a steady round of each method needs, by hand from METHOD's table: (columns, players, score passes).
@pytest.mark.parametrize(
    ("file", "columns", "players", "passes"),
    [
        ("sft", 1, 0, ()),
        ("dpo", 2, 1, ((0, 2),)),
        ("spin", 3, 1, ((2, 3),)),  # mix_previous: y_t and y_{t-1}
        ("tspin", 3, 0, ()),
        ("tpaw", 4, 3, ((2, 4), (1, 1), (0, 1))),
    ],
)
def test_sizes_of_a_steady_round(file: str, columns: int, players: int, passes: tuple[Any, ...]) -> None:
    config = config_of("--config.samples_per_prompt=1", "--config.opponents_per_prompt=1", file=file)
    found = programs.sizes(config)
    assert (found.columns, found.players) == (columns, players)
    if file != "dpo":
        assert found.passes == passes
    assert (found.prompt, found.response) == (16, 32)


@pytest.mark.parametrize(
    ("owners", "sharded", "alone"),
    [
        ([[[0, 0], [1, 1]]], False, True),  # two hosts, tensor within each
        ([[[0, 1], [0, 1]]], False, False),  # tensor lies across
        ([[[0, 0], [1, 1]]], True, False),  # so do the weights
        ([[[0, 0], [0, 0]]], False, False),  # one host
    ],
)
def test_hosts_sample_alone_where_they_can(owners: list[Any], sharded: bool, alone: bool) -> None:
    mesh = types.SimpleNamespace(devices=np.vectorize(lambda i: types.SimpleNamespace(process_index=i))(owners))
    config = config_of(f"--config.sampling.sharded_weights={sharded}")
    assert programs.samples_alone(config, mesh) is alone  # type: ignore[arg-type]


def test_a_host_samples_on_its_own_mesh() -> None:
    whole, host = partitioning.make_mesh(4, 2), partitioning.make_mesh(2, 2, jax.devices()[:4])
    config = config_of("--config.sampling.slots=7")
    together, alone = (programs.build(config, PLAIN, whole, "decode", mesh) for mesh in (None, host))
    assert (together.copies, together.rows, together.mesh.size) == (1, 8, 8)
    assert (alone.copies, alone.rows, alone.mesh.size) == (2, 8, 4)
    assert alone.holds["parameters"] == together.holds["parameters"]  # whole columns, cut over tensor alone
    assert alone.holds["cache"] == 2 * together.holds["cache"]
    assert alone.beside == together.beside
    config.model.compute_dtype = "bfloat16"  # the copy for decoding is cast
    assert programs.build(config, PLAIN, whole, "decode").holds["parameters"] == together.holds["parameters"] / 2


def test_what_a_game_runs() -> None:
    assert programs.names(config_of()) == ["train", "score", "fill", "decode"]
    assert programs.names(config_of(file="sft")) == ["train"]
    assert programs.names(config_of(file="tspin")) == ["train", "fill", "decode"]
    with pytest.raises(UserError, match="sft does not run it"):
        programs.check(config_of(file="sft"), ["decode"])


def forward_flops(rows: int, prompt: int, columns: int, response: int) -> float:
    """Matrix products of PLAIN on a batch of groups, by hand."""
    c = PLAIN
    heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    linear = 2 * c.hidden_size * (2 * heads + 2 * kv + 3 * c.intermediate_size)
    tokens = prompt + columns * response
    attention = 4 * heads * (prompt * prompt + columns * response * (prompt + response))
    logits = 2 * c.hidden_size * c.vocab_size * columns * response
    return rows * (c.num_layers * (tokens * linear + attention) + logits)


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2)])
def test_flops_against_a_hand_count(mesh: tuple[int, int, int]) -> None:
    config = config_of(
        "--config.samples_per_prompt=1", "--config.opponents_per_prompt=1", "--config.train.batch_size=16",
        "--config.scoring.batch_size=16", "--config.train.accumulate=2", "--config.model.remat=full",
        "--config.model.attention=plain",
    )  # fmt: skip
    devices = partitioning.make_mesh(mesh[1], mesh[2], replica=mesh[0])
    score = programs.build(config, PLAIN, devices, "score")
    by_hand = forward_flops(16, 16, 4, 32)
    assert programs.count(score.jitted, score.arguments, devices).total == by_hand
    assert score.model_flops() == by_hand
    train = programs.build(config, PLAIN, devices, "train")
    assert train.model_flops() == 3 * by_hand  # backward: two products for each of the forward pass's
    assert 3.9 * by_hand < programs.count(train.jitted, train.arguments, devices).total <= 4 * by_hand
    assert train.tokens == 16 * (16 + 4 * 32)
    config.train.batch_size = 12  # four rows of filler are computed and do not count
    filled = programs.build(config, PLAIN, devices, "train")
    assert filled.arguments[2].real.shape == (16,)
    assert (filled.model_flops(), filled.tokens) == (train.model_flops() * 12 / 16, train.tokens * 12 / 16)


def test_flops_against_xlas_count_of_an_unrolled_model() -> None:
    shape = dataclasses.replace(
        PLAIN, num_layers=1, hidden_size=512, intermediate_size=2048, vocab_size=4096, num_heads=8, head_dim=64
    )
    model = Model(shape, logits_chunk=64)
    tokens, lengths = jnp.zeros((2, 128), jnp.int32), jnp.full(2, 128)
    traced = jax.jit(model.logits).trace(model.abstract_params(), tokens, lengths)
    ours, xlas = flops.count(traced.jaxpr).total, traced.lower().cost_analysis()["flops"]
    assert 0.99 * xlas < ours <= xlas  # XLA counts additions and exponentials too


def test_flops_through_every_kind_of_call() -> None:
    a = jnp.zeros((8, 4, 6)), jnp.zeros((8, 6, 5))
    once = 2 * 8 * 4 * 6 * 5

    def product(x: jax.Array, y: jax.Array) -> jax.Array:
        return x @ y

    def scanned(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda c, _: (c + jax.checkpoint(product)(x, y), None), jnp.zeros((8, 4, 5)), None, 7)[0]

    def looped(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c.sum() < 3, lambda c: c + product(x, y), jnp.zeros((8, 4, 5)))

    def either(x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.cond(x.sum() > 0, product, lambda x, y: product(x, y) + product(x, y), x, y)

    mesh, spec = partitioning.make_mesh(8), jax.sharding.PartitionSpec("fsdp")
    mapped = jax.shard_map(product, mesh=mesh, in_specs=(spec, spec), out_specs=spec)
    custom = jax.custom_vjp(product)
    custom.defvjp(lambda x, y: (product(x, y), (x, y)), lambda kept, g: (g @ kept[1].mT, kept[0].mT @ g))
    gradient = jax.grad(lambda x, y: custom(x, y).sum(), argnums=(0, 1))
    for function, times in ((product, 1), (scanned, 7), (looped, 1), (either, 2), (mapped, 1), (gradient, 3)):
        assert flops.count(jax.make_jaxpr(jax.jit(function))(*a)).total == times * once, function


def test_bytes_held_are_those_of_real_arrays() -> None:
    mesh = partitioning.make_mesh(4, 2)
    model = Model(PLAIN)
    abstract = programs._params(model, mesh, partitioning.RULES)
    params = jax.jit(model.init, out_shardings=jax.tree.map(lambda x: x.sharding, abstract))(jax.random.key(0))
    real = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(params))
    assert programs.held(abstract) == real


HLO = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: f32[8,16]) -> f32[2,16] {
  %input = f32[8,16]{1,0:T(8,128)} parameter(0)
  %all-reduce.9 = f32[8,16]{1,0:T(8,128)} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[2,16]{1,0:T(8,128)} dynamic-slice(%all-reduce.9), dynamic_slice_sizes={2,16}
}

%fused_gather (p: bf16[4,8]) -> bf16[16,8] {
  %p = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[16,8]{1,0} all-gather(%p), channel_id=3, replica_groups=mesh['a'=4] {'a'}, dimensions={0}
}

%body (carry: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %carry = (s32[]{:T(128)}, /*index=1*/f32[8,16]{1,0:T(8,128)}) parameter(0)
  %gather.0 = bf16[16,8]{1,0} fusion(%carry), kind=kCustom, calls=%fused_gather, backend_config={"window_config":{"estimated_cycles":"100"}}
  %gather.1 = bf16[16,8]{1,0} fusion(%carry), kind=kCustom, calls=%fused_gather, backend_config={"window_config":{"estimated_cycles":"50"}}
  %scatter = f32[2,16]{1,0} fusion(%carry), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %out = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) tuple(%carry, %carry)
}

%condition (carry.1: (s32[], f32[8,16])) -> pred[] {
  %constant.5 = s32[]{:T(128)} constant(5)
  %carry.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %count = s32[]{:T(128)} get-tuple-element(%carry.1), index=0
  ROOT %less = pred[]{:T(512)} compare(%count, %constant.5), direction=LT
}

%until (carry.2: (s32[], f32[8,16])) -> pred[] {
  %carry.2 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %busy = pred[]{:T(512)} custom-call(%carry.2)
  ROOT %not = pred[]{:T(512)} not(%busy)
}

%again (carry.3: (s32[], f32[8,16])) -> (s32[], f32[8,16]) {
  %carry.3 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) parameter(0)
  %work = f32[8,16]{1,0} fusion(%carry.3), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"7"}
  ROOT %while.2 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%carry.3), condition=%condition, body=%body
}

ENTRY %main (p0: f32[8,16]) -> f32[8,16] {
  %p0 = f32[8,16]{1,0:T(8,128)} parameter(0)
  %copy = f32[8,16]{1,0:T(8,128)} copy(%p0), backend_config={"estimated_cycles":"1000"}
  %gather.2 = s32[4]{0:T(128)} all-gather(%p0), channel_id=3, replica_groups={{0,1,2,3}}, dimensions={0}
  %sum.1 = (f32[8,16]{1,0:T(8,128)}, f32[]{:T(128)}) all-reduce(%p0, %copy), channel_id=1, replica_groups=[2,2]<=[2,2]T(1,0), to_apply=%add
  %while.1 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%p0), condition=%condition, body=%body
  %send = (f32[8,16]{1,0:T(8,128)}, u32[], token[]) send(%copy), channel_id=1, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %while.3 = (s32[]{:T(128)}, f32[8,16]{1,0:T(8,128)}) while(%while.1), condition=%until, body=%again
}
"""  # noqa: E501


def test_reading_a_compiled_program() -> None:
    once, repeated = hlo.read(HLO, devices=4, slices=3)
    assert once.cycles == 1000 + 5 * 150
    assert repeated.cycles == 7 + 5 * 150
    assert once.collectives == {
        "across slices: all_reduce": 1, "all-gather": 6, "all-reduce": 1, "reduce-scatter": 5,
    }  # fmt: skip
    gather, scatter = 16 * 8 * 2 * 3 / 4, 8 * 16 * 4 * 3 / 4
    assert repeated.ici_bytes == 5 * (gather + scatter)
    # Another gather on the same channel; an all-reduce of pairs: each sends half, twice.
    assert once.ici_bytes == repeated.ici_bytes + 4 * 4 * 3 / 4 + 2 * (8 * 16 * 4 + 4) / 2
    assert once.dcn_bytes == 2 * 8 * 16 * 4 * 2 / 3
    assert repeated.dcn_bytes == 0


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("replica_groups=[2,4]<=[8], x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=[4,2]<=[2,4]T(1,0), x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        (
            "replica_groups=mesh['a'=2,'b'=1,'c'=4], device_ids=([4,2]T(1,0)) {'a'}, x",
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
    ],
)
def test_groups_of_collectives(text: str, groups: list[list[int]]) -> None:
    assert hlo.replica_groups(text, 8) == groups
