"""Sampling: the filters against NumPy, and the slots against what each prompt must give by itself."""

import dataclasses
import functools
import importlib
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from tiny_models import (
    PLAIN,
    VOCAB,
    WINDOWED,
    loud_params,
    mesh_of,
    random_rows,
    reference_logits,
    reference_token_logps,
)

from selfplay_jax import partitioning
from selfplay_jax.game import Game
from selfplay_jax.groups import pack
from selfplay_jax.logprobs import response_logps
from selfplay_jax.models.decoder import Model
from selfplay_jax.sampling import SamplingFilter, generate
from selfplay_jax.sampling.filters import keep_top_k, keep_top_p

module = importlib.import_module("selfplay_jax.sampling.generate")

MODEL, WINDOW_MODEL = Model(PLAIN), Model(WINDOWED)
STOPS = (3, 8, 13, 21, 34)
NEW = 24


@functools.cache
def weights(model):
    return jax.device_put(loud_params(model, 7, gain=0.7))


def prompts_of(count, longest, seed=2):
    rng = np.random.default_rng(seed)
    rows = random_rows(rng, rng.integers(1, longest + 1, size=count).tolist())
    rows[0] = rows[0][:1]
    rows[1] = [STOPS[0]] * longest  # stop tokens inside a prompt end nothing
    return rows


PROMPTS = prompts_of(26, 16)


def sample(prompts=PROMPTS, **changes):
    """The settings that these tests share; 16 tokens of room for prompts, so that the programs are shared too."""
    settings = {"seed": 5, "max_new_tokens": NEW, "stop_ids": STOPS, "slots": 4, "max_prompt_tokens": 16}
    return generate(MODEL, weights(MODEL), prompts, **(settings | changes))


class Recorder:
    """Watches the programs that `generate` uses and counts the steps of their decode loops."""

    def __init__(self, patch):
        self.steps, self.columns, self.programs = 0, 0, None
        real = module._programs

        def programs(*arguments):
            self.programs = real(*arguments)
            return self.programs._replace(decode=self.decode)

        patch.setattr(module, "_programs", programs)

    def decode(self, params, state, *rest):
        before, self.columns = int(state.column), state.cache.key.shape[3]
        state = self.programs.decode(params, state, *rest)
        # One call takes at most max_new_tokens steps, which is less than once around the ring.
        self.steps += (int(state.column) - before) % self.columns
        return state


@pytest.fixture(scope="module")
def base():
    """What the 26 prompts give, with the recorder that watched and the numbers of finished responses reported."""
    reported = []
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        samples = sample(on_progress=reported.append)
    return samples, recorder, reported


def assert_same(found, wanted, where=slice(None)):
    assert found.tokens == wanted.tokens[where]
    np.testing.assert_array_equal(found.finished, wanted.finished[where])
    np.testing.assert_allclose(found.logps, wanted.logps[where], rtol=1e-4, atol=1e-4)


# --- filters


def loud_logits(rows, seed=0):
    return np.random.default_rng(seed).normal(size=(rows, 12)).astype(np.float32) * 2


def kept(filtered):
    return np.asarray(filtered) > -1e29


@pytest.mark.parametrize("k", [1, 3, 11, 12, 100])
def test_top_k(k):
    logits = loud_logits(6)
    filtered = keep_top_k(jnp.asarray(logits), k)
    rank = (logits[:, None, :] > logits[:, :, None]).sum(-1)  # how many are larger
    np.testing.assert_array_equal(kept(filtered), rank < k)
    np.testing.assert_array_equal(np.asarray(filtered)[kept(filtered)], logits[rank < k])


@pytest.mark.parametrize("p", [1e-6, 0.3, 0.7, 0.95, 0.9999])
def test_top_p(p):
    logits = loud_logits(6)
    probs = np.exp(logits.astype(np.float64))
    probs /= probs.sum(-1, keepdims=True)
    # A token stays while those that are likelier have not reached p yet.
    before = np.where(probs[:, None, :] > probs[:, :, None], probs[:, None, :], 0).sum(-1)
    found = kept(keep_top_p(jnp.asarray(logits), p))
    np.testing.assert_array_equal(found, before < p)
    assert (np.where(found, probs, 0).sum(-1) >= p).all() and found.any(-1).all()


def test_filters_off_and_ties():
    logits = jnp.array([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert keep_top_k(logits, 0) is logits and keep_top_p(logits, 1.0) is logits
    assert kept(keep_top_k(logits, 1)).tolist() == [[False, True, True, False], [True] * 4]
    assert kept(keep_top_k(logits, 3)).tolist() == [[True, True, True, False], [True] * 4]
    assert kept(keep_top_p(logits, 0.2)).tolist() == [[False, True, True, False], [True] * 4]


@pytest.mark.parametrize(
    "choose",
    [
        SamplingFilter(),
        SamplingFilter(temperature=0.5),
        SamplingFilter(temperature=2.0, top_k=5),
        SamplingFilter(top_p=0.8),
        SamplingFilter(temperature=1.5, top_k=6, top_p=0.7),
    ],
    ids=str,
)
def test_frequencies_follow_the_filtered_softmax(choose):
    logits, draws = loud_logits(1)[0].astype(np.float64), 20_000
    scaled = logits / choose.temperature
    order = np.argsort(-scaled)[: choose.top_k or None]
    probs = np.exp(scaled[order]) / np.exp(scaled[order]).sum()
    order = order[np.cumsum(probs) - probs < choose.top_p]
    wanted = np.zeros(12)
    wanted[order] = np.exp(scaled[order]) / np.exp(scaled[order]).sum()

    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, 12))
    drawn = jax.jit(choose)(rows, jax.random.split(jax.random.key(1), draws))
    assert drawn.dtype == jnp.int32
    counts = np.bincount(np.asarray(drawn), minlength=12)
    assert not counts[wanted == 0].any()
    expected = draws * wanted[order]
    chi_square, freedom = ((counts[order] - expected) ** 2 / expected).sum(), len(order) - 1
    assert chi_square < freedom + 4 * np.sqrt(2 * freedom)


def test_greedy_takes_the_first_largest():
    logits = jnp.array([[0.0, 5.0, 5.0], [-1.0, -3.0, -2.0]])
    drawn = SamplingFilter(temperature=0.0, top_k=2)(logits, jax.random.split(jax.random.key(0), 2))
    assert drawn.tolist() == [1, 0]


# --- what a sample depends on


@pytest.mark.parametrize(
    "changes", [{"slots": 1}, {"slots": 64}, {"max_prompt_tokens": 40}, {"max_prompt_tokens": None}], ids=str
)
def test_slots_and_room_change_nothing(base, changes):
    assert_same(sample(**changes), base[0])


def test_order_and_company_change_nothing(base):
    order = np.random.default_rng(0).permutation(len(PROMPTS))
    shuffled = sample([PROMPTS[i] for i in order], prompt_ids=order)
    back = np.argsort(order)
    assert [shuffled.tokens[i] for i in back] == base[0].tokens
    few = [4, 19, 1, 0]
    alone = sample([PROMPTS[i] for i in few], prompt_ids=few)
    assert alone.tokens == [base[0].tokens[i] for i in few]
    strangers = sample([*prompts_of(9, 16, seed=8), *PROMPTS], prompt_ids=[*range(100, 109), *range(26)])
    assert_same(sample(), strangers, slice(9, None))


def test_seed_round_id_and_copy_change_the_sample(base):
    one = PROMPTS[5]
    ids = np.arange(3)
    samples = [
        sample([one] * 3, prompt_ids=ids, samples_per_prompt=2, seed=seed, round_index=t)
        for seed in (5, 6)
        for t in (0, 1)
    ]
    drawn = [tuple(tokens) for s in samples for tokens in s.tokens]
    assert len(drawn) == 4 * 3 * 2
    # A stop token as the first token can be drawn twice by chance; longer ones cannot agree.
    long = [tokens for tokens in drawn if len(tokens) > 3]
    assert len(long) == len(set(long)) > 12
    again = sample([one], prompt_ids=[2], samples_per_prompt=2, seed=6, round_index=1)
    assert [tuple(t) for t in again.tokens] == drawn[-2:]


def test_copies_lie_beside_each_other(base):
    twice = sample(samples_per_prompt=2)
    assert twice.tokens[::2] == base[0].tokens
    assert twice.tokens[1::2] != base[0].tokens
    assert len(twice.tokens) == 52


# --- stop tokens and the length limit


def test_stop_tokens_end_a_response_and_stay(base):
    samples, _, reported = base
    assert sum(reported) == len(samples.tokens) == len(PROMPTS)
    np.testing.assert_array_equal(samples.lengths, [len(tokens) for tokens in samples.tokens])
    assert samples.lengths.min() >= 1 and samples.lengths.max() <= NEW
    for tokens, finished in zip(samples.tokens, samples.finished, strict=True):
        assert finished == (tokens[-1] in STOPS)
        assert not set(tokens[:-1]) & set(STOPS)
        assert finished or len(tokens) == NEW
    assert len({tokens[-1] for tokens in samples.tokens if tokens[-1] in STOPS}) >= 3


def test_cut_at_the_limit_without_an_invented_stop_token(base):
    whole = base[0]
    limit = int(np.sort(whole.lengths)[len(PROMPTS) // 2])
    cut = sample(max_new_tokens=limit)
    assert cut.tokens == [tokens[:limit] for tokens in whole.tokens]
    np.testing.assert_array_equal(cut.finished, whole.finished & (whole.lengths <= limit))
    assert (whole.lengths == limit).any() and 0 < cut.finished.mean() < 1


def test_stop_ids_default_to_the_models(base):
    config = MODEL.config.__class__(**(MODEL.config.__dict__ | {"stop_ids": STOPS}))
    samples = generate(
        Model(config), weights(MODEL), PROMPTS[:4], seed=5, max_new_tokens=NEW, slots=4, max_prompt_tokens=16
    )
    assert samples.tokens == base[0].tokens[:4]
    endless = sample(PROMPTS[:4], stop_ids=())
    assert endless.lengths.tolist() == [NEW] * 4 and not endless.finished.any()


# --- log-probabilities, against one row at a time


def assert_logps(model, prompts, samples):
    params = weights(model)
    scored = jax.jit(functools.partial(response_logps, model))(params, pack(prompts, [[t] for t in samples.tokens]))
    np.testing.assert_allclose(samples.logps, np.asarray(scored)[:, 0], rtol=1e-4, atol=1e-4)
    reference = [
        reference_token_logps(model.config, params, prompt, tokens).sum()
        for prompt, tokens in zip(prompts, samples.tokens, strict=True)
    ]
    np.testing.assert_allclose(samples.logps, reference, rtol=1e-4, atol=1e-4)


def test_logps_agree_with_scoring(base):
    assert_logps(MODEL, PROMPTS, base[0])


@pytest.mark.parametrize("model", [MODEL, WINDOW_MODEL], ids=["plain", "windowed"])
def test_many_times_around_the_ring(model, monkeypatch):
    """Two slots, refilled until the common column has gone around the cache at least four times."""
    recorder = Recorder(monkeypatch)
    prompts = prompts_of(40, 8, seed=4)
    settings = {"temperature": 1.3, "top_k": 9, "top_p": 0.9}
    samples = generate(model, weights(model), prompts, seed=1, max_new_tokens=6, stop_ids=STOPS, slots=2, **settings)
    assert recorder.columns == 8 + 6 and recorder.steps > 4 * recorder.columns
    assert_logps(model, prompts, samples)  # at temperature 1, without filters
    for prompt, tokens in zip(prompts, samples.tokens, strict=True):
        logits = reference_logits(model.config, weights(model), prompt + tokens)[len(prompt) - 1 : -1] / 1.3
        for row, token in zip(logits, tokens, strict=True):
            likelier = np.sort(row[row > row[token]])[::-1]
            assert len(likelier) < 9
            top = np.exp(np.sort(row)[::-1][:9])
            assert np.exp(likelier).sum() / top.sum() < 0.9 + 1e-4


def assert_greedy(model, prompts, samples):
    """Every token is the likeliest after what stands before it, by the NumPy model."""
    for prompt, tokens in zip(prompts, samples.tokens, strict=True):
        logits = reference_logits(model.config, weights(model), prompt + tokens)[len(prompt) - 1 : -1]
        assert tokens == logits.argmax(-1).tolist()


def test_greedy_with_a_sliding_window():
    prompts = prompts_of(5, 16)
    samples = generate(WINDOW_MODEL, weights(WINDOW_MODEL), prompts, seed=0, temperature=0, max_new_tokens=12, slots=3)
    assert samples.lengths.tolist() == [12] * 5
    assert_greedy(WINDOW_MODEL, prompts, samples)


# --- slots and compilations


def test_a_long_answer_holds_nobody_up(base):
    samples, recorder, _ = base
    slots, lengths = 4, samples.lengths
    assert lengths.max() >= 3 * lengths.mean()  # or there is nothing to see
    # Each slot takes the next prompt as soon as it is free (Graham's bound for list scheduling).
    assert recorder.steps <= (lengths.sum() - lengths.max()) / slots + lengths.max()
    assert recorder.steps < 0.5 * -(-len(lengths) // slots) * NEW


def test_a_new_prompt_length_inside_a_bucket_compiles_nothing(monkeypatch):
    recorder = Recorder(monkeypatch)

    def compiled(*lengths):
        sample(random_rows(np.random.default_rng(0), list(lengths)), max_new_tokens=3, slots=2)
        programs = recorder.programs
        return tuple(f._cache_size() for f in (programs.empty, programs.fill, programs.decode, programs.keys))

    first = compiled(8, 3, 5, 2, 7)
    assert first == (1, 1, 1, 1)  # several refills, one program each
    for lengths in [(1, 1), (6, 4, 8), (7,) * 9]:
        assert compiled(*lengths) == first
    assert compiled(9, 5, 12) == (1, 2, 1, 1)  # another bucket: `fill` alone
    assert compiled(16, 2, 11, 3) == (1, 2, 1, 1)


# --- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"samples_per_prompt": 0}, "samples_per_prompt"),
        ({"slots": 0}, "slots"),
        ({"max_prompt_tokens": 15}, "16 tokens"),
        ({"prompts": [[1], []]}, "empty"),
    ],
    ids=str,
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        sample(**changes)


def test_no_prompts():
    samples = sample([])
    assert samples.tokens == [] and samples.lengths.shape == samples.finished.shape == samples.logps.shape == (0,)


# --- eight simulated devices


@pytest.mark.parametrize(
    ("shape", "rules"),
    [*(((shape), "DECODE_RULES") for shape in [(8, 1), (4, 2), (2, 4), (2, 2, 2)]), ((2, 2, 2), "RULES")],
    ids=str,
)
def test_meshes_equal_one_device(base, shape, rules):
    """Two key/value heads on four tensor devices: there the cache is cut over its columns."""
    mesh = mesh_of(*shape)
    params = jax.device_put(weights(MODEL), MODEL.shardings(mesh, getattr(partitioning, rules)))
    # Prompts of one bucket, and equal shapes greedy or not: fewer programs to compile.
    ids = [i for i, prompt in enumerate(PROMPTS) if len(prompt) > 8]
    prompts = [PROMPTS[i] for i in ids]
    settings = {"stop_ids": STOPS, "slots": 8, "max_prompt_tokens": 16, "max_new_tokens": NEW, "mesh": mesh}
    seeded = generate(MODEL, params, prompts, seed=5, prompt_ids=ids, **settings)
    assert len(ids) > 8 and seeded.tokens == [base[0].tokens[i] for i in ids]
    np.testing.assert_allclose(seeded.logps, base[0].logps[ids], rtol=1e-4, atol=1e-4)
    greedy = generate(MODEL, params, prompts, seed=5, temperature=0, **settings)
    assert_greedy(MODEL, prompts, greedy)
    assert len({token for tokens in greedy.tokens for token in tokens}) > VOCAB // 4


def test_a_game_decodes_with_weights_as_they_are_used():
    """Half the memory, and nothing else: every weight is rounded to bfloat16 where it is used anyway."""
    mesh, model = mesh_of(4, 2), dataclasses.replace(MODEL, compute_dtype="bfloat16")
    config = ml_collections.ConfigDict({"sampling": {"sharded_weights": True}})
    game = types.SimpleNamespace(model=model, mesh=mesh, config=config)
    stored = jax.device_put(weights(MODEL), model.shardings(mesh))
    assert Game.for_decoding(game, stored)[1] is stored
    config.sampling.sharded_weights = False
    used, params, there = Game.for_decoding(game, stored)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {used.param_dtype} == {"bfloat16"}
    found, wanted = (
        generate(*both, PROMPTS[:8], seed=5, stop_ids=STOPS, slots=4, max_new_tokens=NEW, mesh=there)
        for both in [(used, params), (model, jax.device_put(stored, model.shardings(mesh, partitioning.DECODE_RULES)))]
    )
    assert found.tokens == wanted.tokens
    np.testing.assert_array_equal(found.logps, wanted.logps)


# --- stop_when: ends that the host sees


def long_or_odd(tokens):
    """Holds from the first multiple of nine on, if 3 tokens stand before it; stays True for longer responses."""
    return any(token % 9 == 0 for token in tokens[3:])


@pytest.mark.parametrize("changes", [{}, {"slots": 1}, {"slots": 64, "temperature": 0.0}])
def test_stop_when_cuts_each_response_where_it_first_holds(base, changes):
    free = sample(**changes)
    found = sample(stop_when=long_or_odd, **changes)
    stopped = 0
    for i, drawn in enumerate(free.tokens):
        wanted = next((drawn[:n] for n in range(1, len(drawn) + 1) if long_or_odd(drawn[:n])), None)
        stopped += wanted is not None and len(wanted) < len(drawn)
        assert found.tokens[i] == (drawn if wanted is None else wanted)
        assert found.lengths[i] == len(found.tokens[i])
        assert found.finished[i] == (free.finished[i] or wanted is not None)
        if wanted is None:
            np.testing.assert_allclose(found.logps[i], free.logps[i], rtol=1e-4, atol=1e-4)
        else:
            assert np.isnan(found.logps[i])
    assert 5 < stopped < len(PROMPTS)


def test_stop_when_that_never_holds_changes_nothing(base):
    assert_same(sample(stop_when=lambda tokens: False), base[0])


def test_stop_when_saves_steps():
    """A slot that was told to stop is released and refilled: all 26 end after 4 tokens, a look comes every 16."""
    with pytest.MonkeyPatch.context() as patch:
        recorder = Recorder(patch)
        samples = sample(stop_ids=(), stop_when=lambda tokens: len(tokens) >= 4, slots=13)
    assert samples.lengths.tolist() == [4] * 26 and samples.finished.all()
    assert recorder.steps == 2 * module._LOOK_EVERY < 2 * NEW
