"""Splash attention, interpreted on CPU: the same log-probabilities and gradients as plain attention."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    PLAIN,
    loud_params,
    mesh_of,
    random_rows,
    reference_logits,
    reference_token_logps,
)

from selfplay_jax import config as configs
from selfplay_jax import partitioning
from selfplay_jax.errors import UserError
from selfplay_jax.groups import Group, pack
from selfplay_jax.logprobs import response_logps, token_logps
from selfplay_jax.models import splash
from selfplay_jax.models.decoder import Model, causal_rows
from selfplay_jax.models.splash_mask import GroupMask
from selfplay_jax.sampling import generate

CONFIGS = {
    "grouped": PLAIN,
    "one each": dataclasses.replace(PLAIN, num_kv_heads=4),
    "windowed": dataclasses.replace(PLAIN, family="qwen2", qkv_bias=True, tie_embeddings=True, sliding_window=37),
    "six on three": dataclasses.replace(PLAIN, num_heads=6, num_kv_heads=3),
}
SLOW = {"one each": pytest.mark.slow}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks of 128: some of a group's are skipped, some cut through a prompt's or a response's end."""
    monkeypatch.setattr(splash, "_LARGEST_BLOCK", 128)


@functools.cache
def case(name):
    """Four prompts with three responses each: a one-token prompt, a full one, empty and full responses."""
    rng = np.random.default_rng(1)
    prompts = random_rows(rng, [1, 96, 150, 67])
    responses = [random_rows(rng, row) for row in [[64, 3, 0], [40, 64, 17], [0, 0, 1], [64, 64, 64]]]
    model = Model(CONFIGS[name], logits_chunk=64)
    return model, loud_params(model, 0), prompts, responses


def group_of(name):
    return pack(*case(name)[2:])


def interpreted(model):
    return dataclasses.replace(model, attention="splash_interpret")


def weighted_sum(model):
    """A function for a sum of the tokens' log-probs with weights of either sign, and the log-probs."""

    def loss(params, group):
        logps = token_logps(model, params, group)
        weights = jnp.cos(group.responses + jnp.arange(logps.shape[2], dtype=jnp.float32)[None, None])
        return jnp.sum(weights * logps), logps

    return loss


def value_and_grad(model, **options):
    """Its program."""
    return jax.jit(jax.value_and_grad(weighted_sum(model), has_aux=True), compiler_options=QUICK, **options)


@functools.cache
def plain_grads(name):
    model, params, *_ = case(name)
    (_, logps), grads = value_and_grad(model)(params, group_of(name))
    return np.asarray(logps), jax.tree.map(np.asarray, grads)


@functools.cache
def expected(name):
    """The NumPy float64 reference: [B, K, R], 0 at padding."""
    model, params, prompts, responses = case(name)
    found = np.zeros((4, 3, 64))
    for b, row in enumerate(responses):
        for k, response in enumerate(row):
            found[b, k, : len(response)] = reference_token_logps(model.config, params, prompts[b], response)
    return found


def assert_trees_close(left, right, relative):
    """Every leaf to within `relative` of its largest entry."""
    for (path, a), b in zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        worst = np.abs(a - b).max() / np.abs(b).max()
        assert worst <= relative, f"{jax.tree_util.keystr(path)}: {worst}"


# --- the mask


@pytest.mark.parametrize(("prompt", "count", "response"), [(5, 3, 4), (6, 1, 7), (1, 4, 1), (9, 0, 0)])
@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_mask_against_its_definition(prompt, count, response, window):
    """Beside the kernel's arithmetic: each response alone after the prompt, seen causally through the window."""
    length = prompt + count * response + 2
    mask = GroupMask(prompt if count else length, response, window, length)
    wanted = np.zeros((length, length), bool)
    time, branch = np.arange(length), np.full(length, -1)
    if count:
        branch[prompt:], time[prompt:] = np.divmod(np.arange(length - prompt), response)
        time[prompt:] += prompt
    for q in range(length):
        for k in range(length):
            same_text = branch[k] in (-1, branch[q])
            wanted[q, k] = same_text and 0 <= time[q] - time[k] < (window or length)
    np.testing.assert_array_equal(mask[slice(0, length), slice(0, length)], wanted)
    np.testing.assert_array_equal(mask[slice(2, 7), slice(1, 4)], wanted[2:7, 1:4])
    assert mask.q_sequence.dtype == np.int32 and mask.shape == (length, length)


@pytest.mark.parametrize(
    ("length", "block", "padded"), [(128, 128, 128), (130, 256, 256), (640, 384, 768), (2560, 512, 2560)]
)
def test_blocks(length, block, padded, monkeypatch):
    monkeypatch.undo()  # the real largest block
    assert splash.block_size(length) == block and -(-length // block) * block == padded


# --- where it serves


def test_what_plain_attention_keeps():
    mixed = dataclasses.replace(PLAIN, sliding_window=5, sliding_window_from_layer=1)
    windowed = dataclasses.replace(PLAIN, sliding_window=5)
    assert splash.layout("splash", PLAIN, 64, 2, 32) == splash.Layout(64, 2, 32)
    assert splash.layout("splash", windowed, 128) == splash.Layout(128, window=5)
    assert splash.layout("splash_interpret", PLAIN, 128) == splash.Layout(128, interpret=True)
    for kind, config, *shape in [
        ("plain", PLAIN, 128),
        ("splash", PLAIN, 64, 1, 32),
        ("splash", mixed, 128),
        ("splash", PLAIN, 1 << 20),
        ("splash", PLAIN, 128, 1 << 10, 8),
    ]:
        assert splash.layout(kind, config, *shape) is None


def test_choices():
    assert [splash.resolve(choice, "tpu") for choice in ("auto", "plain", "splash")] == ["splash", "plain", "splash"]
    assert [splash.resolve(choice, "cpu") for choice in ("auto", "plain", "splash")] == [
        "plain", "plain", "splash_interpret",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="attention must be one of plain, splash, splash_interpret, not 'flash'"):
        Model(PLAIN, attention="flash")
    config = configs.base()
    config.model.attention = "spash"
    with pytest.raises(UserError, match=r"config.model.attention='spash' is not one of .*did you mean splash"):
        configs.check(config)


# --- log-probabilities and gradients


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in CONFIGS])
def test_equals_plain_attention(name):
    model, params, *_ = case(name)
    (_, logps), grads = value_and_grad(interpreted(model))(params, group_of(name))
    np.testing.assert_allclose(logps, expected(name), rtol=0, atol=5e-4)
    np.testing.assert_allclose(logps, plain_grads(name)[0], rtol=0, atol=1e-5)
    assert_trees_close(grads, plain_grads(name)[1], 1e-5)


def test_other_blocks_and_paddings(monkeypatch):
    model, params, *_ = case("grouped")
    monkeypatch.setattr(splash, "_LARGEST_BLOCK", 512)
    group = pack(*case("grouped")[2:], prompt_width=170, response_width=70)
    logps = jax.jit(functools.partial(token_logps, interpreted(model)), compiler_options=QUICK)(params, group)
    np.testing.assert_allclose(logps[..., :64], plain_grads("grouped")[0], rtol=0, atol=1e-5)


def without_segments(real, *arguments):
    return real(*arguments[:3], None, arguments[4])


def without_window(real, *arguments):
    return real(*arguments[:4], dataclasses.replace(arguments[4], window=None))


def wider_window(real, *arguments):
    return real(*arguments[:4], dataclasses.replace(arguments[4], window=38))


def shorter_responses(real, *arguments):
    return real(*arguments[:4], dataclasses.replace(arguments[4], count=6, response=32))


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("grouped", without_segments),
        ("grouped", shorter_responses),
        ("windowed", without_window),
        ("windowed", wider_window),
    ],
)
def test_comparison_sees_deliberate_breaks(name, broken, monkeypatch):
    model, params, *_ = case(name)
    monkeypatch.setattr(splash, "attend", functools.partial(broken, splash.attend))
    logps = jax.jit(functools.partial(token_logps, interpreted(model)), compiler_options=QUICK)(params, group_of(name))
    assert np.isfinite(logps).all()
    assert np.abs(logps - expected(name)).max() >= 2e-2


@pytest.mark.parametrize("name", ["grouped", "windowed"])
def test_rows(name):
    """Logits of right-padded rows, and the keys and values that decoding goes on from."""
    model, params, *_ = case(name)
    rng = np.random.default_rng(2)
    lengths = np.array([200, 1, 129], np.int32)
    rows = random_rows(rng, lengths.tolist())
    tokens = np.array([row + [0] * (200 - len(row)) for row in rows], np.int32)

    def keep(kept, layer, key, value):
        return kept.at[:, layer].set(jnp.stack([key, value]))

    def run(model):
        def program(params):
            decoder, config = model.bind(params), model.config
            empty = jnp.zeros((2, config.num_layers, 3, config.num_kv_heads, 200, config.head_dim))
            return model.logits(params, tokens, lengths), causal_rows(decoder, tokens, lengths, kept=empty, keep=keep)[
                1
            ]

        return jax.jit(program, compiler_options=QUICK)(params)

    (logits, cache), (_, plain_cache) = run(interpreted(model)), run(model)
    for row, length, found in zip(rows, lengths, logits, strict=True):
        np.testing.assert_allclose(found[:length], reference_logits(model.config, params, row), rtol=0, atol=1e-4)
    for found, wanted in zip(cache, plain_cache, strict=True):
        for b, length in enumerate(lengths):
            np.testing.assert_allclose(found[:, b, :, :length], wanted[:, b, :, :length], rtol=0, atol=2e-5)


@pytest.mark.slow
def test_sampling_goes_on_from_what_the_kernel_left():
    """Long prompts, on a mesh: the prefill runs the kernel, the decoding after it does not."""
    model, params, *_ = case("grouped")
    mesh = mesh_of(4, 2)
    params = jax.device_put(params, model.shardings(mesh))
    prompts = random_rows(np.random.default_rng(3), [130, 192, 150, 1, 80, 128])

    def sampled(model):
        return generate(model, params, prompts, seed=7, max_new_tokens=6, stop_ids=[], mesh=mesh)

    kernel, plain = sampled(interpreted(model)), sampled(model)
    assert kernel.tokens == plain.tokens
    np.testing.assert_allclose(kernel.logps, plain.logps, rtol=0, atol=1e-4)
    assert np.any(kernel.logps != plain.logps)  # another program


# --- rematerialisation and memory


def kernels_in(remat):
    """How often each of the kernels stands in the gradient's program for TPUs."""
    model, params, *_ = case("grouped")
    loss = weighted_sum(dataclasses.replace(model, attention="splash", remat=remat))
    program = jax.jit(jax.grad(loss, has_aux=True)).trace(params, group_of("grouped"))
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    return {kernel: text.count(f'kernel_name = "splash_mha_{kernel}_') for kernel in ("fwd", "dq", "dkv")}


def test_dots_keeps_what_the_kernel_computed():
    assert kernels_in("none") == kernels_in("dots") == {"fwd": 1, "dq": 1, "dkv": 1}
    assert kernels_in("full") == {"fwd": 2, "dq": 1, "dkv": 1}


@pytest.mark.parametrize("remat", ["dots", pytest.param("full", marks=pytest.mark.slow)])
def test_rematerialisation_changes_nothing(remat):
    model, params, *_ = case("grouped")
    step = value_and_grad(dataclasses.replace(interpreted(model), remat=remat))
    (_, logps), grads = step(params, group_of("grouped"))
    np.testing.assert_allclose(logps, plain_grads("grouped")[0], rtol=0, atol=1e-5)
    assert_trees_close(grads, plain_grads("grouped")[1], 1e-5)


def widest_pair(jaxpr):
    """The largest second-largest dimension of any array outside the kernels: masks and scores have two long ones."""
    widest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            sizes = sorted(getattr(variable.aval, "shape", ()))
            widest = max(widest, sizes[-2] if len(sizes) > 1 else 0)
        if equation.primitive.name == "pallas_call":
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                widest = max(widest, widest_pair(inner))
    return widest


def test_neither_scores_nor_masks_exist():
    model = Model(PLAIN, logits_chunk=8)
    group = Group(*(np.zeros(shape, np.int32) for shape in [(1, 384), (1,), (1, 2, 256), (1, 2)]))

    def widest(model):
        program = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(response_logps(model, params, group))))
        return widest_pair(program(model.abstract_params()).jaxpr)

    assert widest(interpreted(model)) <= 128  # the kernel's row statistics are 128 lanes wide
    assert widest(model) >= 256


# --- eight simulated devices


def gradients(model, mesh, places, manual):
    """What training does with rows in parallel; and, without `manual`, as the compiler would cut it."""
    step = jax.value_and_grad(weighted_sum(model), has_aux=True)
    scalar, rows = partitioning.replicated(mesh), places[1]
    if manual:
        specs = model.row_specs(mesh)

        def own_rows(params, group):
            (_, logps), grads = jax.value_and_grad(weighted_sum(model), has_aux=True)(params, group)
            return (jnp.float32(0), logps), partitioning.sum_rows(grads, specs)

        out = (jax.sharding.PartitionSpec(), rows.spec), specs
        step = partitioning.over_rows(own_rows, mesh, (specs, rows.spec), out)
    return jax.jit(step, in_shardings=places, out_shardings=((scalar, rows), places[0]), compiler_options=QUICK)


MESHES = [
    pytest.param("grouped", (2, 2, 2), True, id="replica"),
    pytest.param("grouped", (4, 2), True, marks=pytest.mark.slow, id="fsdp-tensor"),
    pytest.param("grouped", (2, 4), True, id="two heads of keys on four devices"),
    pytest.param("grouped", (4, 2), False, id="left to the compiler"),
    pytest.param("six on three", (4, 2), True, marks=pytest.mark.slow, id="three heads of keys on two devices"),
    pytest.param("six on three", (4, 2), False, id="the same, left to the compiler"),
]


@pytest.mark.parametrize(("name", "sizes", "manual"), MESHES)
def test_meshes_equal_one_device(name, sizes, manual):
    model, params, *_ = case(name)
    group, mesh = group_of(name), mesh_of(*sizes)
    places = model.shardings(mesh), partitioning.rows(mesh)
    with partitioning.use_mesh(mesh):
        (_, logps), grads = gradients(interpreted(model), mesh, places, manual)(
            *jax.device_put((params, group), places)
        )
    np.testing.assert_allclose(logps, plain_grads(name)[0], rtol=0, atol=1e-5)
    assert_trees_close(grads, plain_grads(name)[1], 1e-5)


# --- the real compiler

COMPILE = """
import jax, jax.numpy as jnp
from jax.experimental import topologies
from selfplay_jax import partitioning
from selfplay_jax.groups import Group
from selfplay_jax.logprobs import response_logps
from selfplay_jax.models import splash
from selfplay_jax.models.config import ModelConfig
from selfplay_jax.models.decoder import Model

mesh = partitioning.make_mesh(2, 2, topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices)
attention = splash.resolve("auto", partitioning.platform(mesh))
model = Model(
    ModelConfig("llama", 1024, 512, 1024, 2, 4, 2, 128), compute_dtype="bfloat16", remat="dots", attention=attention
)
abstract, rows = model.abstract_params(), partitioning.rows(mesh)
places, specs = model.shardings(mesh), model.row_specs(mesh)

def gradient(params, group):
    grads = jax.grad(lambda params: jnp.sum(response_logps(model, params, group)))(params)
    return partitioning.sum_rows(grads, specs)

step = jax.jit(partitioning.over_rows(gradient, mesh, (specs, rows.spec), specs), out_shardings=places)
params = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, places)
shapes = [(4, 192), (4,), (4, 3, 96), (4, 3)]
group = Group(*(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for shape in shapes))
with partitioning.use_mesh(mesh):
    print(step.lower(params, group).compile().as_text())
"""


@pytest.mark.tpu_compile
def test_compiles_for_a_tpu():
    """With training's way of cutting rows; in a process of its own, as libtpu refuses this one's compiler flags."""
    pytest.importorskip("libtpu")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu"}
    tests = pathlib.Path(__file__).parent
    env["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for kernel in ("fwd", "dq", "dkv"):
        lines = [line for line in done.stdout.splitlines() if f"splash_mha_{kernel}" in line]
        assert any("tpu_custom_call" in line for line in lines), kernel
