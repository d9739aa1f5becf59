"""Log-probabilities of responses that share a prompt, against one row at a time in NumPy float64."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import (
    PLAIN,
    VOCAB,
    WINDOWED,
    loud_params,
    mesh_of,
    random_rows,
    reference_token_logps,
)

from selfplay_jax import logprobs, partitioning
from selfplay_jax.groups import pack
from selfplay_jax.logprobs import response_logps, token_logps
from selfplay_jax.models import attention, decoder
from selfplay_jax.models.config import ModelConfig
from selfplay_jax.models.decoder import Model

CONFIGS = {"plain": PLAIN, "windowed": WINDOWED}
# Most of this file's time is spent in LLVM: half of it without optimisation.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def case(name):
    """A model, its weights, 8 prompts with 3 responses each: one-token prompts, unequal lengths, empty responses."""
    rng = np.random.default_rng(1)
    prompts = random_rows(rng, [1, 11, 4, 16, 1, 7, 2, 9])
    lengths = [[8, 3, 0], [1, 8, 5], [2, 0, 7], [6, 8, 1], [0, 0, 0], [4, 4, 4], [3, 1, 8], [8, 8, 8]]
    responses = [random_rows(rng, row) for row in lengths]
    model = Model(CONFIGS[name], logits_chunk=4)
    return model, loud_params(model, 0), prompts, responses


@functools.cache
def expected_tokens(name):
    """The NumPy reference: one float64 array a response."""
    model, params, prompts, responses = case(name)
    config = model.config
    return [
        [reference_token_logps(config, params, prompt, response) for response in row]
        for prompt, row in zip(prompts, responses, strict=True)
    ]


def expected(name):
    """Their sums, float64 [B, K]."""
    return np.array([[tokens.sum() for tokens in row] for row in expected_tokens(name)])


def logps_of(model, params, group):
    program = jax.jit(functools.partial(response_logps, model), compiler_options=QUICK)
    return np.asarray(program(params, group))


def weighted_sum(model, params, group):
    """A scalar that gives every response another weight, of either sign."""
    logps = response_logps(model, params, group)
    weights = jnp.cos(jnp.arange(logps.size, dtype=jnp.float32)).reshape(logps.shape)
    return jnp.sum(weights * logps), logps


def value_and_grad(model, **jit_options):
    def loss(params, group):
        return weighted_sum(model, params, group)

    return jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK, **jit_options)


@functools.cache
def one_device_grads(name):
    model, params, prompts, responses = case(name)
    (_, logps), grads = value_and_grad(model)(params, pack(prompts, responses))
    return np.asarray(logps), jax.tree.map(np.asarray, grads)


def assert_trees_close(left, right, relative):
    """Every leaf to within `relative` of its largest entry."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for (path, a), b in zip(jax.tree.leaves_with_path(left), jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        worst = np.abs(a - b).max() / np.abs(b).max()
        assert worst <= relative, f"{jax.tree_util.keystr(path)}: {worst}"


# --- the shared prompt


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_separate_rows(name):
    model, params, prompts, responses = case(name)
    group = pack(prompts, responses)
    found = logps_of(model, params, group)
    assert found.dtype == np.float32 and found.shape == (8, 3)
    np.testing.assert_allclose(found, expected(name), rtol=1e-5, atol=1e-5)
    assert (found[group.response_lengths == 0] == 0).all()
    assert (found[group.response_lengths > 0] < -0.1).all()


def test_token_logps_and_padding():
    model, params, prompts, responses = case("plain")
    group = pack(prompts, responses, prompt_width=24, response_width=12)
    found = np.asarray(jax.jit(functools.partial(token_logps, model))(params, group))
    wanted = np.zeros((8, 3, 12))
    for b, row in enumerate(expected_tokens("plain")):
        for k, tokens in enumerate(row):
            wanted[b, k, : len(tokens)] = tokens
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert (found[wanted == 0] == 0).all()


@pytest.mark.parametrize("filler", [0, VOCAB - 1])
def test_what_padding_holds_is_nothing(filler):
    """Long rows beside short ones give the same as alone, whatever ids stand in the padding."""
    model, params, prompts, responses = case("plain")
    group = pack(prompts, responses)
    beyond = np.arange(16)[None] >= group.prompt_lengths[:, None]
    group.prompt[beyond] = filler
    beyond = np.arange(8)[None, None] >= group.response_lengths[..., None]
    group.responses[beyond] = filler
    np.testing.assert_allclose(logps_of(model, params, group), expected("plain"), rtol=1e-5, atol=1e-5)


# --- deliberate breaks: the comparison above must see every one of them


def break_attention(change):
    """Passes attention's arguments for the responses through `change(prompt_lengths, arguments by name)`."""

    def apply(patch, group):
        real, lengths = attention.attend_responses, jnp.asarray(group.prompt_lengths)
        names = ("query", "prompt_key", "prompt_value", "key", "value", "prompt_mask", "mask")

        def broken(*arguments):
            return real(**change(lengths, dict(zip(names, arguments, strict=True))))

        patch.setattr(attention, "attend_responses", broken)

    return apply


def see_first_response(_, a):
    """Responses 1, 2, ... see response 0's keys too, as if they belonged to the prompt."""
    first = a["key"][:, 0], a["value"][:, 0]
    batch, count, length = a["query"].shape[:3]
    others = jnp.arange(count)[None, :, None, None] > 0
    seen = jnp.broadcast_to(a["mask"], (batch, count, length, length)) & others
    before = jnp.broadcast_to(a["prompt_mask"], (batch, count, *a["prompt_mask"].shape[2:]))
    a["prompt_key"] = jnp.concatenate([a["prompt_key"], first[0]], axis=1)
    a["prompt_value"] = jnp.concatenate([a["prompt_value"], first[1]], axis=1)
    a["prompt_mask"] = jnp.concatenate([before, seen], axis=-1)
    return a


def prompt_columns(select):
    """Shows or hides columns of the prompt: `select(mask, column, context [B, 1, 1, 1])`."""

    def change(lengths, a):
        columns = jnp.arange(a["prompt_key"].shape[1])[None, None, None]
        mask = select(a["prompt_mask"], columns, (lengths - 1)[:, None, None, None])
        return a | {"prompt_mask": mask}

    return break_attention(change)


def break_projection(shift):
    """Moves the positions of the responses' inputs: `shift(positions [B, K, R])`."""

    def apply(patch, group):
        real = decoder.Block.project

        def broken(self, x, positions):
            return real(self, x, shift(positions) if x.ndim == 4 else positions)

        patch.setattr(decoder.Block, "project", broken)

    return apply


def break_inputs(change):
    """Calls `group_hidden` with other prompts, lengths or responses."""

    def apply(patch, group):
        real = logprobs.group_hidden
        patch.setattr(logprobs, "group_hidden", lambda module, *inputs: real(module, *change(*inputs)))

    return apply


def prompt_not_causal(patch, group):
    real = attention.attend_rows

    def broken(query, key, value, mask):
        return real(query, key, value, mask | mask.any(axis=1, keepdims=True))

    patch.setattr(attention, "attend_rows", broken)


def window_off_by_one(patch, group):
    real = decoder._near
    patch.setattr(decoder, "_near", lambda mask, distance, window: real(mask, distance - 1, window))


def window_ignored(patch, group):
    patch.setattr(decoder, "_near", lambda mask, distance, window: mask)


BREAKS = {
    "a response sees another response": break_attention(see_first_response),
    "response keys of a neighbour": break_attention(lambda _, a: a | {"key": jnp.roll(a["key"], 1, axis=1)}),
    "response not causal": break_attention(lambda _, a: a | {"mask": jnp.ones_like(a["mask"])}),
    "prompt padding visible": prompt_columns(lambda mask, column, context: mask | (column > context)),
    "last prompt token twice": prompt_columns(lambda mask, column, context: mask | (column == context)),
    "prompt mask one short": prompt_columns(lambda mask, column, context: mask & (column < context - 1)),
    "first prompt token hidden": prompt_columns(lambda mask, column, context: mask & (column > 0)),
    "positions start at 0": break_projection(lambda positions: positions - positions[..., :1]),
    "positions one late": break_projection(lambda positions: positions + 1),
    "last prompt token missing": break_inputs(lambda p, n, r: (p, jnp.maximum(n - 1, 1), r)),
    "inputs not shifted": break_inputs(lambda p, n, r: (p, n, jnp.roll(r, -1, axis=-1))),
    "prompt not causal": prompt_not_causal,
}
WINDOW_BREAKS = {"window off by one": window_off_by_one, "window ignored": window_ignored}


@pytest.mark.parametrize(("name", "broken"), [("plain", b) for b in BREAKS] + [("windowed", b) for b in WINDOW_BREAKS])
def test_comparison_sees_deliberate_breaks(name, broken, monkeypatch):
    model, params, prompts, responses = case(name)
    group = pack(prompts, responses)
    (BREAKS | WINDOW_BREAKS)[broken](monkeypatch, group)
    with jax.disable_jit():  # sooner done than compiling each
        found = np.asarray(response_logps(model, params, group))
    assert np.isfinite(found).all()
    assert np.abs(found - expected(name)).max() >= 2e-2


@pytest.mark.parametrize("name", CONFIGS)
def test_without_breaks_the_uncompiled_function_is_right(name):
    model, params, prompts, responses = case(name)
    with jax.disable_jit():
        found = response_logps(model, params, pack(prompts, responses))
    np.testing.assert_allclose(found, expected(name), rtol=1e-5, atol=1e-5)


# --- gradients


def test_gradients_equal_those_of_separate_rows():
    model, params, prompts, responses = case("windowed")
    flat = [(prompt, r) for prompt, row in zip(prompts, responses, strict=True) for r in row]
    tokens = np.zeros((len(flat), 24), np.int32)
    scored = np.zeros((len(flat), 23), np.float32)
    for i, (prompt, r) in enumerate(flat):
        tokens[i, : len(prompt) + len(r)] = [*prompt, *r]
        scored[i, len(prompt) - 1 : len(prompt) + len(r) - 1] = np.cos(np.float32(i))
    lengths = np.array([len(prompt) + len(r) for prompt, r in flat], np.int32)

    def loss(params):
        logps = jax.nn.log_softmax(model.logits(params, tokens, lengths)[:, :-1])
        return jnp.sum(scored * jnp.take_along_axis(logps, tokens[:, 1:, None], axis=-1)[..., 0])

    separate = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)
    assert_trees_close(one_device_grads("windowed")[1], separate, 2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_are_slopes_of_the_reference(name):
    """Along random directions, against central differences of the NumPy float64 reference."""
    model, params, prompts, responses = case(name)
    grads = one_device_grads(name)[1]
    weights = np.cos(np.arange(24.0)).reshape(8, 3)
    rng = np.random.default_rng(5)
    for _ in range(3):
        direction = jax.tree.map(lambda x: rng.normal(size=x.shape), params)

        def value(step, direction=direction):
            moved = jax.tree.map(lambda x, d: np.asarray(x, np.float64) + step * d, params, direction)
            return sum(
                weights[b, k] * reference_token_logps(model.config, moved, prompts[b], response).sum()
                for b, row in enumerate(responses)
                for k, response in enumerate(row)
            )

        slope = (value(1e-5) - value(-1e-5)) / 2e-5
        products = jax.tree.map(lambda g, d: np.sum(g.astype(np.float64) * d), grads, direction)
        scale = sum(np.linalg.norm(leaf) ** 2 for leaf in jax.tree.leaves(grads)) ** 0.5
        assert abs(sum(jax.tree.leaves(products)) - slope) <= 2e-5 * scale


def test_rematerialisation_changes_nothing():
    model, params, prompts, responses = case("plain")
    logps, grads = one_device_grads("plain")
    for remat in ("dots", "full"):
        again = value_and_grad(dataclasses.replace(model, remat=remat))(params, pack(prompts, responses))
        np.testing.assert_allclose(again[0][1], logps, rtol=1e-6, atol=1e-6)
        assert_trees_close(again[1], grads, 2e-6)


def test_scoring_and_training_agree():
    """The log ratio of a policy with itself, scored by one program and trained by another, is zero."""
    for name in CONFIGS:
        model, params, prompts, responses = case(name)
        scored = logps_of(model, params, pack(prompts, responses))
        trained = one_device_grads(name)[0]
        np.testing.assert_allclose(trained, scored, rtol=1e-6, atol=1e-6)


# --- precision and chunks


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunks_change_nothing(chunk):
    model, params, prompts, responses = case("plain")
    found = logps_of(dataclasses.replace(model, logits_chunk=chunk), params, pack(prompts, responses))
    np.testing.assert_allclose(found, expected("plain"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_bfloat16_compute(param_dtype):
    model, _, prompts, responses = case("plain")
    model = dataclasses.replace(model, compute_dtype="bfloat16", param_dtype=param_dtype)
    params = jax.tree.map(lambda x: x.astype(param_dtype), loud_params(model, 0, gain=0.5))
    group = pack(prompts, responses)
    found = logps_of(model, params, group)
    assert found.dtype == np.float32
    assert (found.astype(jnp.bfloat16).astype(np.float32) != found).any()  # not rounded on the way
    wanted = [
        [reference_token_logps(PLAIN, params, prompt, r).sum() for r in row]
        for prompt, row in zip(prompts, responses, strict=True)
    ]
    assert (np.abs(found - wanted) <= 2e-2 * np.sqrt(group.response_lengths)).all()


# --- memory

LARGE = ModelConfig("llama", 32768, 32, 64, 1, 2, 1, 16)


def temporary_bytes(length, chunk):
    """Temporary memory of a compiled gradient step on 2 prompts with 2 responses of `length` tokens."""
    model = Model(LARGE, logits_chunk=chunk, remat="full")

    def loss(params, group):
        return jnp.sum(response_logps(model, params, group))

    group = pack([[1] * 8] * 2, [[[2] * length] * 2] * 2, response_width=length)
    step = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    return step.lower(model.abstract_params(), group).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_with_vocabulary_times_length():
    def logits_bytes(length):
        return 2 * 2 * length * LARGE.vocab_size * 4

    short, long, unchunked = temporary_bytes(32, 8), temporary_bytes(128, 8), temporary_bytes(128, 128)
    assert short > logits_bytes(8)  # the analysis sees the chunk
    # From 32 to 128 positions the logits, if they were all there, would grow by 48 MiB.
    assert long - short < 0.05 * (logits_bytes(128) - logits_bytes(32))
    assert unchunked - long > 0.9 * (logits_bytes(128) - logits_bytes(8))


# --- eight simulated devices


@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (2, 4), (2, 2, 2)], ids=str)
def test_meshes_equal_one_device(shape):
    """The compiler's own way of cutting it, without `over_rows`."""
    model, params, prompts, responses = case("plain")
    group, mesh = pack(prompts, responses), mesh_of(*shape)
    places = model.shardings(mesh), partitioning.rows(mesh)
    scalar = partitioning.replicated(mesh)
    step = value_and_grad(model, in_shardings=places, out_shardings=((scalar, scalar), places[0]))
    placed = jax.device_put((params, group), places)
    cut = placed[0]["layers"]["gate"]["kernel"].sharding.shard_shape((2, 16, 32))
    assert cut == (2, 16 // shape[-2], 32 // shape[-1])  # the test cuts something
    with partitioning.use_mesh(mesh):
        (_, logps), grads = step(*placed)
    one_logps, one_grads = one_device_grads("plain")
    np.testing.assert_allclose(logps, one_logps, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logps, expected("plain"), rtol=1e-5, atol=1e-5)
    assert_trees_close(grads, one_grads, 1e-5)
