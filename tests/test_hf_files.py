"""Weight files: stored types, shards one at a time, tokenizer files, and what is refused before a tensor is read."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import transformers
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import mesh_of

from selfplay_jax.data import builtin
from selfplay_jax.errors import UserError
from selfplay_jax.models import Model, hf_weights, load_hf, read_config, save_hf

GOLDEN = pathlib.Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in GOLDEN.iterdir() if (path / "config.json").is_file())
SHARD = 20_000  # bytes: several shards for each golden model


def _tensors(directory: pathlib.Path) -> dict[str, np.ndarray]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: value for file in files for name, value in safetensors.numpy.load_file(file).items()}


def _assert_same_bytes(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
        assert ours[name].tobytes() == value.tobytes()


def _assert_equal(ours: Any, theirs: Any) -> None:
    jax.tree.map(lambda one, other: np.testing.assert_array_equal(np.asarray(one), np.asarray(other)), ours, theirs)


def _as_type(name: str, dtype: Any, directory: pathlib.Path) -> pathlib.Path:
    """A golden model with its tensors in another type, written by the safetensors library."""
    shutil.copytree(GOLDEN / name, directory)
    tensors = {key: value.astype(dtype) for key, value in _tensors(directory).items()}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory


def _sharded(name: str, directory: pathlib.Path) -> pathlib.Path:
    model, params = load_hf(GOLDEN / name)
    save_hf(directory, model, params, max_shard_bytes=SHARD)
    return directory


# Types


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_files_come_back_byte_for_byte(name: str, tmp_path: pathlib.Path) -> None:
    source = _as_type(name, ml_dtypes.bfloat16, tmp_path / "source")
    stored = _tensors(source)
    model, params = load_hf(source, param_dtype="bfloat16")
    save_hf(tmp_path / "narrow", model, params, max_shard_bytes=SHARD)
    _assert_same_bytes(_tensors(tmp_path / "narrow"), stored)
    _assert_equal(load_hf(tmp_path / "narrow", param_dtype="bfloat16")[1], params)
    model, wide = load_hf(source)
    save_hf(tmp_path / "wide", model, wide, dtype="bfloat16")
    _assert_same_bytes(_tensors(tmp_path / "wide"), stored)
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_other_float_types_load(dtype: Any, tmp_path: pathlib.Path) -> None:
    source = _as_type("qwen2_tied", dtype, tmp_path / "source")
    embedding = _tensors(source)["model.embed_tokens.weight"]
    _, params = load_hf(source)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["embed"]["embedding"], embedding.astype(np.float32))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parameters_on_the_host_are_saved_alike(dtype: str, tmp_path: pathlib.Path) -> None:
    model, params = load_hf(GOLDEN / "mistral_window")
    save_hf(tmp_path / "out", model, jax.device_get(params), dtype=dtype)
    golden = {name: value.astype(dtype) for name, value in _tensors(GOLDEN / "mistral_window").items()}
    _assert_same_bytes(_tensors(tmp_path / "out"), golden)


def test_unknown_export_type_is_refused(tmp_path: pathlib.Path) -> None:
    model, params = load_hf(GOLDEN / "qwen2_tied")
    with pytest.raises(UserError, match=r"^dtype: exported tensors can be float32, bfloat16, float16, not 'int8'"):
        save_hf(tmp_path / "out", model, params, dtype="int8")
    assert not (tmp_path / "out").exists()


# Shards


def test_tensors_are_stored_layer_by_layer(tmp_path: pathlib.Path) -> None:
    directory = _sharded("llama_bias_head_dim", tmp_path / "out")
    names: list[str] = []
    for file in sorted(directory.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="np") as opened:
            names += opened.offset_keys()
    assert names[:3] == [
        "model.embed_tokens.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
    ]
    assert names[-3:] == ["model.layers.1.post_attention_layernorm.weight", "model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names if "layers" in name]
    assert layers == sorted(layers)
    assert names == list(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"])


def test_one_file_is_open_at_a_time(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = _sharded("mistral_window", tmp_path / "out")
    real, now, most = safetensors.safe_open, [0], [0]

    @contextmanager
    def counted(path: Any, framework: str) -> Any:
        now[0] += 1
        most[0] = max(most[0], now[0])
        with real(path, framework=framework) as file:
            yield file
        now[0] -= 1

    monkeypatch.setattr(hf_weights.safetensors, "safe_open", counted)
    _, params = load_hf(directory)
    assert (now, most) == ([0], [1])
    _assert_equal(params, load_hf(GOLDEN / "mistral_window")[1])


@pytest.mark.parametrize("name", ["llama_tied_rope32", "llama_bias_head_dim", "qwen2_window_from_layer"])
def test_shards_go_into_the_training_layout(name: str, tmp_path: pathlib.Path) -> None:
    directory = _sharded(name, tmp_path / "out")
    shardings = Model(read_config(directory)).shardings(mesh_of(4, 2))
    model, params = load_hf(directory, param_dtype="bfloat16", shardings=shardings)
    assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, params, shardings))
    assert any(8 * leaf.addressable_shards[0].data.size == leaf.size for leaf in jax.tree.leaves(params))  # all cut
    _assert_equal(params, load_hf(GOLDEN / name, param_dtype="bfloat16")[1])
    save_hf(tmp_path / "again", model, params)
    narrow = {key: value.astype(ml_dtypes.bfloat16) for key, value in _tensors(GOLDEN / name).items()}
    _assert_same_bytes(_tensors(tmp_path / "again"), narrow)


def test_a_layout_that_cuts_the_layers_is_refused() -> None:
    config = read_config(GOLDEN / "qwen2_tied")
    whole = NamedSharding(mesh_of(4, 2), PartitionSpec())
    shardings = jax.tree.map(lambda _: whole, Model(config).abstract_params())
    shardings["layers"]["up"]["kernel"] = NamedSharding(mesh_of(4, 2), PartitionSpec("tensor"))
    with pytest.raises(ValueError, match=r"^layers.up.kernel: its sharding .* cuts the axis of layers"):
        load_hf(GOLDEN / "qwen2_tied", shardings=shardings)


def test_tied_head_in_a_shard(tmp_path: pathlib.Path) -> None:
    directory = _sharded("qwen2_tied", tmp_path / "out")
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    file = index["weight_map"].pop("model.embed_tokens.weight")
    index["weight_map"]["lm_head.weight"] = file
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    tensors = safetensors.numpy.load_file(directory / file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    safetensors.numpy.save_file(tensors, directory / file)
    _assert_equal(load_hf(directory)[1], load_hf(GOLDEN / "qwen2_tied")[1])


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
def test_host_memory_stays_below_a_shard_and_a_layer(devices: int) -> None:
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "benchmarks/loading.py", "--megabytes=300", f"--devices={devices}", "--json"]
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["devices"] == devices
    bound = result["bound_bytes"]
    assert bound < result["largest_stacked_bytes"] / 2  # one parameter's whole stack would not pass for it
    assert result["parameter_bytes"] > 200e6
    assert result["load"]["beside_parameters_bytes"] < bound
    assert result["save"]["beside_parameters_bytes"] < bound


# Tokenizers


def test_tokenizer_and_templates_are_copied_byte_for_byte(tmp_path: pathlib.Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "llama_gqa_rope", source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(builtin.BASE)
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}\n", "tool_use": "tools: {{ tools }}"}
    tokenizer.save_pretrained(source)
    assert (source / "additional_chat_templates" / "tool_use.jinja").is_file()  # as transformers 5 writes them
    others = ("tokenizer.model", "tokenizer.model.v3", "tekken.json", "merges.txt", "chat_template.json")
    for name in others:
        (source / name).write_bytes(f"\r\n{name}\xff".encode("latin-1"))
    (source / "generation_config.json").write_text('{"top_k": 7, "eos_token_id": [4, 5, 6], "sentinel": "kept"}')
    model, params = load_hf(source)
    for name in ("out", "twice"):  # an export is a source too
        save_hf(tmp_path / name, model, params, source=source)
        source = tmp_path / name
    save_hf(tmp_path / "twice", model, params, source=tmp_path / "source")  # and is replaced by the next one
    first, last = tmp_path / "source", tmp_path / "twice"
    (first / "expected.npz").unlink()
    files = {file.relative_to(first) for file in first.rglob("*") if file.is_file()}
    assert files == {file.relative_to(last) for file in last.rglob("*") if file.is_file()}
    for file in files - {pathlib.Path(name) for name in ("config.json", "generation_config.json", "model.safetensors")}:
        assert (last / file).read_bytes() == (first / file).read_bytes()
    for name in others:
        (last / name).unlink()
    assert transformers.AutoTokenizer.from_pretrained(last).chat_template == tokenizer.chat_template
    generation = transformers.GenerationConfig.from_pretrained(last)
    assert (generation.top_k, generation.eos_token_id, generation.sentinel) == (7, [4, 5, 6], "kept")


# Refused


def _index(directory: pathlib.Path, change: Callable[[dict[str, str]], Any]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def _second(directory: pathlib.Path) -> pathlib.Path:
    return sorted(directory.glob("model-*.safetensors"))[1]


def _only(directory: pathlib.Path, *names: str) -> None:
    for file in directory.glob("model*"):
        file.unlink()
    for name in names:
        (directory / name).write_bytes(b"{}")


def _edit_config(directory: pathlib.Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def _integers(directory: pathlib.Path) -> None:
    tensors = safetensors.numpy.load_file(_second(directory))
    safetensors.numpy.save_file({k: v.astype(np.int8) for k, v in tensors.items()}, _second(directory))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: _second(d).unlink(),
         r"model-00002-of-\d+\.safetensors: no such file, but .*index.json says it holds tensor '.*' and \d+ more$"),
        (lambda d: _second(d).write_bytes(_second(d).read_bytes()[:-8]),
         r"model-00002-of-0000\d\.safetensors: damaged or not a safetensors file: "),
        (lambda d: _second(d).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00"),
         r"model-00002-of-.* \(it is a git-lfs pointer: fetch the file itself"),
        (lambda d: _index(d, lambda m: m.update({"model.norm.weight": m["model.embed_tokens.weight"]})),
         r"model-00001-of-.*: tensor 'model.norm.weight' is missing, though model.safetensors.index.json says that"),
        (lambda d: _index(d, lambda m: m.pop("model.norm.weight")),
         r"index.json: tensor 'model.norm.weight' is missing$"),
        (lambda d: _index(d, lambda m: m.update(dict.fromkeys(m, "pytorch_model.bin"))),
         r"weight_map.*: 'pytorch_model.bin' is no safetensors file; convert with"),
        (_integers, r"model-00002-of-.*: tensor 'model\..*' has type I8; only .* are supported \(and \d+ more\)$"),
        (lambda d: _only(d, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"),
         r"holds pytorch_model-00001-of-00002.bin but no model.safetensors, and pickled .* convert them once"),
        (lambda d: _only(d, "pytorch_model.bin.index.json"),  # what a download leaves, which skips *.bin
         r"holds pytorch_model.bin.index.json but no model.safetensors, .*save_pretrained\(NEW_DIR\)$"),
        (lambda d: _only(d), r"holds neither model.safetensors nor .*pickled weights are never opened"),
        (lambda d: _edit_config(d, auto_map={"AutoModelForCausalLM": "evil.Model"}),
         r"config.json: auto_map: the model is defined by code in its repository \(evil.Model\), which never runs"),
        (lambda d: _edit_config(d, architectures=["GPT2LMHeadModel"], model_type="gpt2"),
         r"config.json: architectures: \['GPT2LMHeadModel'\] is not supported, only Llama"),
    ],
)  # fmt: skip
def test_broken_shards_are_refused_by_name(
    damage: Callable[[pathlib.Path], Any], message: str, tmp_path: pathlib.Path
) -> None:
    directory = _sharded("llama_bias_head_dim", tmp_path / "model")
    damage(directory)
    with pytest.raises(UserError, match=message):
        load_hf(directory)


def test_pickles_beside_safetensors_are_left_alone(tmp_path: pathlib.Path) -> None:
    directory = _sharded("qwen2_tied", tmp_path / "model")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors"):
        (directory / name).write_bytes(b"not to be opened")
    _assert_equal(load_hf(directory)[1], load_hf(GOLDEN / "qwen2_tied")[1])
