"""Adapters: what they compute against NumPy, merged against unmerged, alone in checkpoints, and in PEFT's files."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from tiny_models import PLAIN, WINDOWED, loud_params, mesh_of, random_rows, reference_logits
from tiny_models import reference_token_logps as reference
from toy_training import SETTINGS, TPAW, assert_close, one_device, table

from selfplay_jax.checkpoints import Checkpoints, abstract_like
from selfplay_jax.errors import Stopped, UserError
from selfplay_jax.groups import pack
from selfplay_jax.logprobs import response_logps
from selfplay_jax.methods import plan
from selfplay_jax.models import Model, lora, save_hf
from selfplay_jax.models.config import PROJECTIONS, Lora
from selfplay_jax.train import programs, train

ADAPTERS = Lora(rank=3, alpha=12.0)
SOME = Lora(rank=2, alpha=1.0, targets=("q", "v", "down"))


def adapted(config, adapters, seed=0, size=0.3):
    """A model with loud weights and adapters that matter."""
    model = Model(config, lora=adapters)
    rng = np.random.default_rng(seed)
    trained = model.split(model.abstract_params())[0]
    noise = jax.tree.map(lambda leaf: (size * rng.normal(size=leaf.shape)).astype(np.float32), trained)
    return model, model.join(noise, loud_params(Model(config), seed))


def merged_by_hand(params, adapters):
    """W + alpha / rank * A B in float64, a layer at a time."""
    layers = {}
    for name, projection in params["layers"].items():
        plain = {key: value for key, value in projection.items() if not key.startswith("lora")}
        if name in adapters.targets:
            a, b = (np.asarray(projection[key], np.float64) for key in ("lora_a", "lora_b"))
            kernel = np.asarray(plain["kernel"], np.float64)
            pairs = zip(a, b, strict=True)
            product = np.stack([x.reshape(-1, adapters.rank) @ y.reshape(adapters.rank, -1) for x, y in pairs])
            plain["kernel"] = kernel + adapters.alpha / adapters.rank * product.reshape(kernel.shape)
        layers[name] = plain
    return {**params, "layers": layers}


@pytest.mark.parametrize(("config", "adapters"), [(PLAIN, ADAPTERS), (WINDOWED, SOME)], ids=["all", "some"])
def test_log_probs_with_adapters_are_those_of_the_merged_weights(config, adapters):
    model, params = adapted(config, adapters)
    rng = np.random.default_rng(1)
    prompts, responses = random_rows(rng, [5, 3]), [random_rows(rng, [4, 6]), random_rows(rng, [2, 1])]
    group = pack(prompts, responses)
    by_hand = merged_by_hand(params, adapters)
    wanted = [[reference(config, by_hand, p, z).sum() for z in row] for p, row in zip(prompts, responses, strict=True)]
    ours = jax.jit(response_logps, static_argnums=0)(model, params, group)
    np.testing.assert_allclose(ours, wanted, atol=2e-4)
    plain, merged = lora.merge(model, params)
    assert plain == Model(config)
    assert jax.tree.structure(merged) == jax.tree.structure(plain.abstract_params())
    np.testing.assert_allclose(jax.jit(response_logps, static_argnums=0)(plain, merged, group), wanted, atol=2e-4)
    base = jax.jit(response_logps, static_argnums=0)(plain, model.split(params)[1], group)
    assert np.abs(np.asarray(base) - wanted).max() > 0.1  # the adapters are no matter of rounding


def test_new_adapters_change_nothing():
    model = Model(PLAIN, lora=ADAPTERS)
    fresh = model.init(jax.random.key(3))
    a = fresh["layers"]["o"]["lora_a"]
    bound = (PLAIN.num_heads * PLAIN.head_dim) ** -0.5
    assert a.shape == (2, 4, 8, 3) and a.dtype == np.float32
    assert 0.9 * bound < np.abs(a).max() <= bound and abs(float(a.mean())) < 0.1 * bound
    assert not np.any(fresh["layers"]["o"]["lora_b"])
    params = model.join(model.split(fresh)[0], loud_params(Model(PLAIN), 0))
    tokens = random_rows(np.random.default_rng(0), [7])
    logits = model.logits(params, np.array(tokens), np.array([7]))
    np.testing.assert_allclose(logits[0], reference_logits(PLAIN, params, tokens[0]), atol=2e-5)


def test_split_and_join_are_inverse_and_disjoint():
    model, params = adapted(WINDOWED, SOME)
    trained, frozen = model.split(params)
    assert set(trained) == {"layers"} and set(trained["layers"]) == {"q", "v", "down"}
    assert len(jax.tree.leaves(trained)) == 6
    joined = model.join(trained, frozen)
    assert jax.tree.structure(joined) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(joined), jax.tree.leaves(params), strict=True))
    assert Model(PLAIN).split(frozen) == (frozen, {})


def test_bfloat16_base_keeps_float32_adapters():
    model = Model(PLAIN, param_dtype="bfloat16", compute_dtype="bfloat16", lora=ADAPTERS)
    trained, frozen = model.split(model.abstract_params())
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {np.dtype("float32")}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(frozen)} == {"bfloat16"}
    merged = lora.merge(model, model.init(jax.random.key(0)))[1]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(merged)} == {"bfloat16"}


@pytest.fixture(scope="module")
def objective():
    return plan("tpaw", TPAW, round_index=1, window=3).objective


DATA = table(24, opponents=2, players=2)


@pytest.mark.parametrize("shape", [(1, 1), (4, 2)])
def test_steps_move_the_adapters_alone_and_agree_on_every_mesh(shape, objective):
    mesh = one_device() if shape == (1, 1) else mesh_of(*shape)
    model, params = adapted(PLAIN, ADAPTERS)
    trained, frozen = model.split(jax.device_put(params, model.shardings(mesh)))
    before = jax.device_get(frozen)
    parts = programs(model, objective, SETTINGS, mesh)
    state = parts.init(trained)
    batch = jax.device_put(DATA.batch(np.arange(8), size=8, epoch=0, per_round=1), parts.rows)
    state, metrics = parts.step(state, frozen, batch, np.float32(1e-2))
    assert jax.tree.structure(state.params) == jax.tree.structure(model.split(params)[0])
    moved = jax.tree.map(lambda new, old: np.abs(np.asarray(new) - old).max(), state.params, model.split(params)[0])
    assert min(jax.tree.leaves(moved)) > 1e-6
    assert_close(jax.device_get(frozen), before, rtol=0)
    # The gradient of a merged model by finite differences: along the step just taken the loss falls as it says.
    after = model.join(state.params, frozen)
    again, _ = parts.step(parts.init(jax.tree.map(np.copy, model.split(params)[0])), frozen, batch, np.float32(0.0))
    assert_close(jax.device_get(again.params), model.split(params)[0], rtol=0)
    assert float(metrics["grad_norm"]) > 0 and np.isfinite(jax.tree.leaves(after)[0]).all()


def test_only_adapters_are_saved_and_a_round_resumes_from_them(tmp_path, objective):
    mesh = one_device()
    model, params = adapted(PLAIN, ADAPTERS)
    settings = dataclasses.replace(SETTINGS, epochs=1, batch_size=8, checkpoint_every=1)

    def run(name, stop_after=None):
        checkpoints = Checkpoints(tmp_path / name, window=3)
        calls = iter(range(100))
        try:
            result = train(
                model, jax.device_put(params, model.shardings(mesh)), DATA, objective, settings,
                mesh=mesh, seed=0, round_index=1, opponents_per_prompt=1, checkpoints=checkpoints,
                directory=checkpoints._directory / "round",
                should_stop=lambda: stop_after is not None and next(calls) >= stop_after,
            )  # fmt: skip
        finally:
            checkpoints.close()
        return result

    whole = jax.device_get(run("whole"))
    with pytest.raises(Stopped):
        run("stopped", stop_after=2)
    assert_close(jax.device_get(run("stopped")), whole, rtol=0)
    checkpoints = Checkpoints(tmp_path / "whole", window=3)
    trained = model.split(whole)[0]
    checkpoints.save_player(1, trained, score=None)
    abstract = abstract_like(*(model.split(tree)[0] for tree in (model.abstract_params(), model.shardings(mesh))))
    assert_close(jax.device_get(checkpoints.load_player(1, abstract)), trained, rtol=0)
    checkpoints.close()


def of(rank, alpha, targets):
    return lora.of_config({"rank": rank, "alpha": alpha, "targets": targets})


def test_targets_are_checked():
    assert of(0, 16.0, "nonsense") is None
    assert of(4, 8.0, "down, q") == Lora(4, 8.0, ("q", "down"))
    assert of(4, 8.0, ",".join(PROJECTIONS)).scale == 2.0
    with pytest.raises(UserError, match=r"config\.lora\.targets has 'query'; .* q, k, v, o, gate, up, down"):
        of(4, 8.0, "q,query")
    with pytest.raises(UserError, match="is empty"):
        of(4, 8.0, " ")


def test_peft_files(tmp_path):
    model, params = adapted(WINDOWED, SOME)
    lora.save_peft(tmp_path / "out", model, params, base="some/base")
    lora.save_peft(tmp_path / "out", model, model.split(params)[0], base="some/base")  # replaces
    config = json.loads((tmp_path / "out" / lora.ADAPTER_CONFIG).read_text())
    assert config["peft_type"] == "LORA" and config["base_model_name_or_path"] == "some/base"
    assert config["r"] == 2 and config["lora_alpha"] == 1.0
    assert config["target_modules"] == ["down_proj", "q_proj", "v_proj"]
    arrays = safetensors.numpy.load_file(tmp_path / "out" / lora.ADAPTER_WEIGHTS)
    assert len(arrays) == 3 * 3 * 2
    a = arrays["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"]
    b = arrays["base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight"]
    np.testing.assert_array_equal(a, np.asarray(params["layers"]["q"]["lora_a"])[2].T)
    np.testing.assert_array_equal(b, np.asarray(params["layers"]["q"]["lora_b"])[2].reshape(2, -1).T)
    with pytest.raises(UserError, match=r"config\.lora\.rank above 0"):
        lora.save_peft(tmp_path / "out", Model(WINDOWED), params, base="x")


@pytest.mark.torch
def test_peft_loads_the_export_and_computes_the_same(tmp_path):
    """Read by peft itself: its logits are ours, merged and unmerged."""
    torch = pytest.importorskip("torch", reason="torch is not installed (.ci/run installs it)")
    peft = pytest.importorskip("peft", reason="peft is not installed (.ci/run installs it)")
    import transformers

    model, params = adapted(WINDOWED, dataclasses.replace(SOME, targets=PROJECTIONS))
    plain, base = Model(WINDOWED), model.split(params)[1]
    save_hf(tmp_path / "base", plain, base)
    lora.save_peft(tmp_path / "adapters", model, params, base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager"),
        tmp_path / "adapters",
    )
    tokens = np.array(random_rows(np.random.default_rng(0), [9, 9]))
    ours = np.asarray(model.logits(params, tokens, np.array([9, 9])))
    with torch.no_grad():
        np.testing.assert_allclose(theirs(torch.tensor(tokens)).logits.numpy(), ours, atol=1e-4)
        whole = theirs.merge_and_unload()
        np.testing.assert_allclose(whole(torch.tensor(tokens)).logits.numpy(), ours, atol=1e-4)
    without = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    assert np.abs(without(torch.tensor(tokens)).logits.detach().numpy() - ours).max() > 0.1
