"""`python -m selfplay_jax.models.inspect`: what it says of sound and of broken directories, and its exit codes."""

import dataclasses
import json
import pathlib
import shutil
import struct
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy

from selfplay_jax.data import builtin
from selfplay_jax.errors import UserError
from selfplay_jax.models import Model, RopeScaling, load_hf, read_config, save_hf
from selfplay_jax.models.hf_config import config_from_hf, config_to_hf
from selfplay_jax.models.hf_tensors import in_file_order, tensors
from selfplay_jax.models.inspect import SHOWN, inspect, main

GOLDEN = pathlib.Path(__file__).parent / "golden"


def _edit_config(directory: pathlib.Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def sharded(tmp_path: pathlib.Path) -> pathlib.Path:
    """A model with biases, in several shards."""
    model, params = load_hf(GOLDEN / "llama_bias_head_dim")
    save_hf(tmp_path / "model", model, params, max_shard_bytes=20_000)
    return tmp_path / "model"


def test_a_model_with_its_tokenizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(builtin.BASE), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    model, params = load_hf(builtin.BASE)
    assert report == inspect(builtin.BASE)
    assert (report["loadable"], report["problems"]) == (True, [])
    assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert report["bytes"]["float32"] == 2 * report["bytes"]["bfloat16"] == report["bytes"]["files"]
    assert report["tensors"]["loaded"] == report["tensors"]["stored"]
    assert report["tokens"]["ends"] == list(model.config.stop_ids)
    tokenizer = report["tokenizer"]
    assert (tokenizer["tokens"], tokenizer["fits"]) == (model.config.vocab_size, True)
    assert "tokenizer.json" in tokenizer["files"]
    assert main([str(builtin.BASE)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for part in ("llama (LlamaForCausalLM)", "100,928", "embeddings tied", "20 of 20 would load", "52 tokens"):
        assert part in printed.out


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama_tied_rope32", ["embeddings tied", "scaled: llama3 by 32, frequency factors 1 and 4, from 48 tokens"]),
        ("llama_bias_head_dim", ["qkv, attention output, mlp", "of dimension 12", "scaled: linear by 4"]),
        ("qwen2_window_from_layer", ["qwen2 (Qwen2ForCausalLM)", "window 8 from layer 1 on", "biases          qkv"]),
        ("mistral_window", ["mistral (MistralForCausalLM)", "window 8\n", "not scaled", "tokenizer       none\n"]),
    ],
)  # fmt: skip
def test_every_family_and_switch(name: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(GOLDEN / name)]) == 0
    printed = capsys.readouterr().out
    for part in parts:
        assert part in printed


def test_all_problems_are_listed(sharded: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = sorted(sharded.glob("model-*.safetensors"))
    files[1].unlink()
    last = safetensors.numpy.load_file(files[-1])
    last["model.norm.weight"] = np.ones(32, np.int16)
    last["stranger"] = np.ones(3, np.float32)
    last["lm_head.weight"] = last["lm_head.weight"][:, :-1].copy()
    safetensors.numpy.save_file(last, files[-1])
    index = sharded / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    value["weight_map"]["stranger"] = files[-1].name
    gone = value["weight_map"].pop("model.layers.1.mlp.up_proj.bias")
    assert gone != files[1].name
    index.write_text(json.dumps(value))
    report = inspect(sharded)
    assert not report["loadable"]
    assert [(problem["kind"], problem["name"]) for problem in report["problems"]] == [
        ("file", files[1].name),
        ("missing", "model.layers.1.mlp.up_proj.bias"),
        ("unexpected", "stranger"),
        ("dtype", "model.norm.weight"),
        ("shape", "lm_head.weight"),
    ]
    assert report["files"][files[1].name] is None
    assert report["tensors"]["loaded"] < report["tensors"]["wanted"]
    with pytest.raises(UserError) as refusal:  # loading names the first of them, in the same words
        load_hf(sharded)
    assert str(refusal.value) == report["problems"][0]["sentence"]
    assert main([str(sharded)]) == 1
    printed = capsys.readouterr()
    assert "5: 1 file, 1 missing, 1 unexpected, 1 dtype, 1 shape" in printed.out
    assert "not there" in printed.out
    assert printed.err.count("\n") == 1 and files[1].name in printed.err


def test_long_lists_are_cut_with_a_count(sharded: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    _edit_config(sharded, num_hidden_layers=5)
    missing = 3 * 16
    assert main([str(sharded)]) == 1
    printed = capsys.readouterr().out
    assert f"problems        {missing}: {missing} missing" in printed
    assert printed.count(" is missing") == SHOWN
    assert f"and {missing - SHOWN} more" in printed
    assert main([str(sharded), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == missing


def test_tokenizer_that_does_not_fit(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, params = load_hf(GOLDEN / "llama_gqa_rope")
    small = dataclasses.replace(model, config=dataclasses.replace(model.config, vocab_size=48))
    params["embed"]["embedding"] = params["embed"]["embedding"][:48]
    params["head"]["kernel"] = params["head"]["kernel"][:, :48]
    save_hf(tmp_path / "model", small, params, source=builtin.BASE)
    assert main([str(tmp_path / "model")]) == 1
    printed = capsys.readouterr()
    assert "52 tokens, MORE THAN THE VOCABULARY HOLDS" in printed.out
    assert "the tokenizer does not fit the model" in printed.err
    (tmp_path / "model" / "tokenizer.json").write_text("{")
    assert main([str(tmp_path / "model")]) == 1
    printed = capsys.readouterr()
    assert "cannot load a tokenizer" in printed.err and "tokenizer       does not load" in printed.out


def test_only_headers_are_read(tmp_path: pathlib.Path) -> None:
    """An 8B model of holes: 16 GB by its headers, nothing on the disk."""
    fields = {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    }  # fmt: skip
    config = dataclasses.replace(config_from_hf(fields), rope_scaling=RopeScaling("llama3", 8.0))
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config, dtype="bfloat16")))
    header: dict[str, Any] = {}
    end = 0
    for name, entry, _ in in_file_order(tensors(config)):
        begin, end = end, end + 2 * int(np.prod(entry.file_shape))
        header[name] = {"dtype": "BF16", "shape": entry.file_shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    assert (tmp_path / "model.safetensors").stat().st_blocks < 1000
    report = inspect(tmp_path)
    assert report["loadable"]
    assert report["parameters"] == 8_030_261_248
    assert report["bytes"]["files"] == report["bytes"]["bfloat16"] == 2 * 8_030_261_248
    assert report["tensors"]["dtypes"] == {"BF16": 291}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"model_type": "gpt2", "architectures": None}, "config.json: model_type: 'gpt2' is not supported"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "config.json: auto_map: the model is defined by code in its repository"),
    ],
)
def test_unreadable_directories_get_one_sentence(
    fields: dict[str, Any], sentence: str, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = pathlib.Path(shutil.copytree(GOLDEN / "llama_gqa_rope", tmp_path / "model"))
    _edit_config(directory, **fields)
    assert main([str(directory)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert sentence in printed.err and printed.err.count("\n") == 1
    assert main([str(tmp_path / "nowhere")]) == 1
    assert "no such directory" in capsys.readouterr().err


def test_parameter_count_is_that_of_the_tree() -> None:
    for directory in sorted(path for path in GOLDEN.iterdir() if (path / "config.json").is_file()):
        model = Model(read_config(directory))
        count = sum(leaf.size for leaf in jax.tree.leaves(model.abstract_params()))
        assert inspect(directory)["parameters"] == count
