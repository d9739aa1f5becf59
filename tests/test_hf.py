"""Hugging Face directories in and out, against golden files of transformers' torch models (tests/golden/)."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import transformers
from jax.sharding import NamedSharding, PartitionSpec

from selfplay_jax.errors import UserError
from selfplay_jax.models import Model, RopeScaling, hf_save, load_hf, read_config, save_hf
from selfplay_jax.sampling import generate

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if path.is_dir() and (path / "config.json").is_file())


def _copy(name: str, tmp_path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def _edit_config(directory: pathlib.Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _edit_tensors(directory: pathlib.Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def _all_tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in safetensors.numpy.load_file(file).items()}


def _assert_same(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


# Against transformers


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens_are_those_of_transformers(name: str) -> None:
    model, params = load_hf(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    tokens, lengths, greedy = expected["tokens"], expected["lengths"], expected["greedy"]
    rows = np.zeros((len(tokens), tokens.shape[1] + greedy.shape[1]), np.int32)
    prompts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    for row, prompt, answer in zip(rows, prompts, greedy, strict=True):
        row[: len(prompt) + len(answer)] = [*prompt, *answer]
    logits = jax.jit(model.logits)(params, rows, lengths + greedy.shape[1])
    assert logits.dtype == jnp.float32
    for ours, theirs, length, answer in zip(np.asarray(logits), expected["logits"], lengths, greedy, strict=True):
        np.testing.assert_allclose(ours[:length], theirs[:length], atol=1e-4, rtol=0)
        # Each greedy token is the argmax after those before it; and so the sampler, below, must find them.
        np.testing.assert_array_equal(ours[length - 1 :][: len(answer)].argmax(-1), answer)
    samples = generate(
        model, params, prompts, seed=0, temperature=0.0, max_new_tokens=greedy.shape[1], stop_ids=(), slots=2
    )
    np.testing.assert_array_equal(np.array(samples.tokens), greedy)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama_gqa_rope", {"rope_scaling": None}),
        ("llama_gqa_rope", {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)}),
        ("llama_gqa_rope", {"rope_theta": 1100.0}),
        ("llama_tied_rope32", {"rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 48)}),
        ("llama_bias_head_dim", {"rope_scaling": None}),
        ("llama_bias_head_dim", {"rms_norm_eps": 1e-6}),
        ("qwen2_window_from_layer", {"sliding_window_from_layer": 0}),
        ("qwen2_window_from_layer", {"sliding_window": None}),
        ("mistral_window", {"sliding_window": 9}),
        ("mistral_window", {"sliding_window": 7}),
    ],
)
def test_golden_files_see_a_wrong_configuration(name: str, change: dict[str, Any]) -> None:
    model, params = load_hf(GOLDEN / name)
    expected = np.load(GOLDEN / name / "expected.npz")
    broken = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
    logits = np.asarray(jax.jit(broken.logits)(params, expected["tokens"], expected["lengths"]))
    assert np.abs(logits[0] - expected["logits"][0]).max() > 1e-3  # row 0 has no padding


@pytest.mark.parametrize("name", NAMES)
def test_golden_files_see_every_parameter(name: str) -> None:
    model, params = load_hf(GOLDEN / name)
    tokens, lengths = (np.load(GOLDEN / name / "expected.npz")[key] for key in ("tokens", "lengths"))

    def loss(params: Any) -> jax.Array:
        return jnp.square(model.logits(params, tokens, lengths)).sum()

    gradients = jax.tree.map(lambda leaf: float(jnp.abs(leaf).max()), jax.jit(jax.grad(loss))(params))
    silent = [path for path, size in jax.tree.leaves_with_path(gradients) if size < 1e-3]
    assert silent == []


def test_pretrained_stories_model_tells_a_story(shared: pathlib.Path) -> None:
    path = shared / "models" / "tinystories-656k"
    model, params = load_hf(path)
    assert model.config.tie_embeddings  # though the file holds only lm_head.weight
    assert model.config.stop_ids == (2,)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    prompt = tokenizer("Once upon a time").input_ids
    samples = generate(model, params, [prompt], seed=0, temperature=0.0, max_new_tokens=16, slots=1)
    assert "a little girl named Lily" in tokenizer.decode(samples.tokens[0])


# Files in and out


@pytest.mark.parametrize("name", NAMES)
def test_round_trip_is_byte_identical(name: str, tmp_path: pathlib.Path) -> None:
    model, params = load_hf(GOLDEN / name)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), model.abstract_params())
    save_hf(tmp_path / "one", model, params)
    original, saved = _all_tensors(GOLDEN / name), _all_tensors(tmp_path / "one")
    assert original.keys() == saved.keys()
    for key, value in original.items():
        assert saved[key].dtype == value.dtype
        assert saved[key].shape == value.shape
        assert saved[key].tobytes() == value.tobytes()
    again_model, again = load_hf(tmp_path / "one")
    assert again_model == model
    _assert_same(again, params)
    save_hf(tmp_path / "two", again_model, again)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize("name", NAMES)
def test_saved_config_is_read_alike_by_transformers(name: str, tmp_path: pathlib.Path) -> None:
    model, params = load_hf(GOLDEN / name)
    save_hf(tmp_path / "out", model, params)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    reference = transformers.AutoConfig.from_pretrained(GOLDEN / name)
    assert type(theirs) is type(reference)
    known = reference.to_dict().keys() - {"transformers_version", "initializer_range", "_name_or_path"}
    if model.config.sliding_window is None:
        known -= {"max_window_layers"}
    ours, wanted = theirs.to_dict(), reference.to_dict()
    assert {key: ours[key] for key in known} == {key: wanted[key] for key in known}
    transformers.GenerationConfig.from_pretrained(tmp_path / "out")


def test_bfloat16_parameters(tmp_path: pathlib.Path) -> None:
    model, params = load_hf(GOLDEN / "llama_bias_head_dim", param_dtype="bfloat16")
    exact = load_hf(GOLDEN / "llama_bias_head_dim")[1]
    _assert_same(params, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), exact))
    save_hf(tmp_path / "out", model, params)
    assert {str(value.dtype) for value in _all_tensors(tmp_path / "out").values()} == {"bfloat16"}
    assert str(transformers.AutoConfig.from_pretrained(tmp_path / "out").dtype) in (
        "bfloat16",
        "torch.bfloat16",
    )
    _assert_same(load_hf(tmp_path / "out", param_dtype="bfloat16")[1], params)
    widened = load_hf(tmp_path / "out")[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(widened)} == {jnp.dtype("float32")}


def test_sharded_files_with_an_index(tmp_path: pathlib.Path) -> None:
    model, params = load_hf(GOLDEN / "mistral_window")
    save_hf(tmp_path / "out", model, params, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [sum(t.nbytes for t in safetensors.numpy.load_file(tmp_path / "out" / f).values()) for f in files]
    assert max(sizes) <= 30_000
    assert sum(sizes) == index["metadata"]["total_size"]
    _assert_same(load_hf(tmp_path / "out")[1], params)


def test_parameters_go_into_their_shardings_and_back(tmp_path: pathlib.Path) -> None:
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"))
    config = read_config(GOLDEN / "llama_gqa_rope")
    shardings = jax.tree.map(
        lambda leaf: NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), "tensor")),
        Model(config).abstract_params(),
    )
    model, params = load_hf(GOLDEN / "llama_gqa_rope", shardings=shardings)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, params, shardings))
    _assert_same(params, load_hf(GOLDEN / "llama_gqa_rope")[1])
    save_hf(tmp_path / "out", model, params)
    _assert_same(load_hf(tmp_path / "out")[1], params)


def test_tied_models_load_from_either_matrix(tmp_path: pathlib.Path) -> None:
    directory = _copy("qwen2_tied", tmp_path)
    _, params = load_hf(directory)
    assert "head" not in params
    _edit_tensors(directory, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    model, from_head = load_hf(directory)
    _assert_same(from_head, params)
    save_hf(tmp_path / "out", model, from_head)
    assert "lm_head.weight" not in _all_tensors(tmp_path / "out")
    # Both there and different: transformers ties to the embedding, and so do we.
    _edit_tensors(directory, lambda t: t.update({"model.embed_tokens.weight": t["lm_head.weight"] + 1}))
    np.testing.assert_array_equal(load_hf(directory)[1]["embed"]["embedding"], params["embed"]["embedding"] + 1)


def test_rotary_buffers_of_old_files_are_ignored(tmp_path: pathlib.Path) -> None:
    directory = _copy("mistral_window", tmp_path)
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    _edit_tensors(directory, lambda t: t.update(buffers))
    _assert_same(load_hf(directory)[1], load_hf(GOLDEN / "mistral_window")[1])


def test_export_carries_its_source_through(tmp_path: pathlib.Path) -> None:
    source = _copy("llama_gqa_rope", tmp_path)
    _edit_config(source, auto_map={"AutoTokenizer": ["evil.py", None]}, attention_dropout=0.25, sentinel=7)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [5, 3]}')
    (source / "tokenizer.json").write_text("{}")
    (source / "merges.txt").write_text("a b")
    (source / "evil.py").write_text("raise SystemExit")
    model, params = load_hf(source)
    assert model.config.stop_ids == (5, 3)
    save_hf(tmp_path / "out", model, params, source=source)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    expected = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "merges.txt"}
    assert names == expected
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["attention_dropout"], config["sentinel"]) == (0.25, 7)
    assert "auto_map" not in config
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["eos_token_id"]) == (0.6, [5, 3])
    # A source of another family lends its tokenizer, not its fields.
    other, other_params = load_hf(GOLDEN / "mistral_window")
    save_hf(tmp_path / "out", other, other_params, source=source)
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert "sentinel" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert read_config(tmp_path / "out") == other.config


def test_failed_export_leaves_the_earlier_one(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, params = load_hf(GOLDEN / "qwen2_tied")
    save_hf(tmp_path / "out", model, params)

    def full_disk(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_save, "_write_shard", full_disk)
    with pytest.raises(UserError, match=r"out: the model could not be written: .*No space left"):
        save_hf(tmp_path / "out", model, jax.tree.map(jnp.zeros_like, params))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    _assert_same(load_hf(tmp_path / "out")[1], params)


def test_export_refuses_to_replace_what_is_no_export(tmp_path: pathlib.Path) -> None:
    model, params = load_hf(GOLDEN / "qwen2_tied")
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex, which is no part of an exported model"):
        save_hf(tmp_path, model, params)
    with pytest.raises(UserError, match="is a file"):
        save_hf(tmp_path / "thesis.tex", model, params)


# Broken directories


def _without(name: str) -> Callable[[pathlib.Path], None]:
    return lambda directory: _edit_tensors(directory, lambda t: t.pop(name))


def _truncate(directory: pathlib.Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _only_pickle(directory: pathlib.Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _lost_shard(directory: pathlib.Path) -> None:
    model, params = load_hf(directory)
    shutil.rmtree(directory)
    save_hf(directory, model, params, max_shard_bytes=30_000)
    sorted(directory.glob("*.safetensors"))[1].unlink()


def _escaping_index(directory: pathlib.Path) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _integers(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = np.ones(32, np.int8)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("lm_head.weight"), r"model\.safetensors: tensor 'lm_head.weight' is missing; .*tie_word"),
        (_without("model.embed_tokens.weight"), r"tensor 'model.embed_tokens.weight' is missing"),
        (_without("model.layers.1.mlp.up_proj.bias"), r"'model.layers.1.mlp.up_proj.bias' is missing$"),
        (lambda d: _edit_config(d, num_hidden_layers=3), r"'model.layers.2.* is missing \(and 15 more\)"),
        (lambda d: _edit_config(d, num_hidden_layers=1), r"tensor 'model.layers.1.* has no place"),
        (lambda d: _edit_config(d, intermediate_size=64),
         r"'model.layers.0.mlp.gate_proj.weight' has shape \(48, 32\), but config.json asks for \(64, 32\)"),
        (lambda d: _edit_tensors(d, _integers), r"tensor 'model.norm.weight' has type I8"),
        (_truncate, r"model\.safetensors: damaged or not a safetensors file"),
        (lambda d: (d / "model.safetensors").write_bytes(b""), r"model\.safetensors: damaged"),
        (_lost_shard,
         r"model-00002-of-\d+\.safetensors: no such file, but model.safetensors.index.json says .*'model\."),
        (_escaping_index, r"weight_map.model.norm.weight: expected the name of a file in the same directory"),
        (_only_pickle, r"holds pytorch_model.bin but no model.safetensors, .* convert them"),
        (lambda d: (d / "model.safetensors").unlink(), r"holds neither model.safetensors nor"),
        (lambda d: (d / "config.json").unlink(), r"config.json: no such file"),
        (lambda d: (d / "config.json").write_text("{"), r"config.json: not readable as JSON"),
        (lambda d: (d / "config.json").write_text("[]"), r"config.json: expected a JSON object"),
        (lambda d: _edit_config(d, hidden_act="relu"), r"config.json: hidden_act: 'relu' is not supported"),
    ],
)  # fmt: skip
def test_broken_directories_are_refused_by_name(
    damage: Callable[[pathlib.Path], Any], message: str, tmp_path: pathlib.Path
) -> None:
    directory = _copy("llama_bias_head_dim", tmp_path)
    damage(directory)
    with pytest.raises(UserError, match=message):
        load_hf(directory)


@pytest.mark.parametrize("path", ["./no/such/dir", "runs/sft/hf/final", "~/nothing"])
def test_no_directory(path: str) -> None:
    with pytest.raises(UserError, match=rf"^{path}: no such directory\. .*SFT run"):
        load_hf(path)


@pytest.mark.parametrize("path", ["nobody/nothing", "nothing"])
def test_neither_directory_nor_repository(path: str) -> None:
    with pytest.raises(UserError, match=f"^{path}: no such directory, and the Hub gave: ."):
        load_hf(path)


def test_repository_comes_from_the_hub_client(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.extend((name, allow_patterns, ignore_patterns))
        return str(GOLDEN / "qwen2_tied")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    _assert_same(load_hf("Qwen/Qwen2.5-0.5B")[1], load_hf(GOLDEN / "qwen2_tied")[1])
    assert asked[0] == "Qwen/Qwen2.5-0.5B"
    assert "*.safetensors" in asked[1]
    assert not any(pattern.endswith((".bin", ".py", ".pt")) for pattern in asked[1])
