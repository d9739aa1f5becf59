"""Live comparison with transformers' torch models; without torch, test_hf.py has golden files instead."""

import importlib
import pathlib
import sys

import jax
import numpy as np
import pytest
import transformers

from selfplay_jax.models import load_hf, save_hf
from selfplay_jax.models.hf_tensors import in_file_order, tensors
from selfplay_jax.sampling import generate

torch = pytest.importorskip("torch", reason="torch is not installed (.ci/run installs it)")
sys.path.insert(0, str(pathlib.Path(__file__).parent / "golden"))
make_golden = importlib.import_module("make_golden")

pytestmark = pytest.mark.torch
CASES = make_golden.cases()
SEED = 100  # other weights and prompts than the golden files'


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """A torch model of the case, the directory that transformers saved it in, and its answers."""
    torch.set_num_threads(1)
    theirs = make_golden.random_model(CASES[request.param], SEED)
    directory = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(directory)
    return directory, make_golden.reference(theirs, make_golden.random_prompts(theirs.config.vocab_size, SEED))


def test_logits(case) -> None:
    directory, expected = case
    model, params = load_hf(directory)
    logits = np.asarray(jax.jit(model.logits)(params, expected["tokens"], expected["lengths"]))
    real = np.arange(logits.shape[1])[None] < expected["lengths"][:, None]
    assert np.abs(expected["logits"][real]).max() > 3.0
    np.testing.assert_allclose(logits[real], expected["logits"][real], atol=1e-4, rtol=0)


def test_greedy_decode_is_token_identical(case) -> None:
    directory, expected = case
    model, params = load_hf(directory)
    prompts = [row[:n].tolist() for row, n in zip(expected["tokens"], expected["lengths"], strict=True)]
    samples = generate(
        model,
        params,
        prompts,
        seed=0,
        temperature=0.0,
        max_new_tokens=make_golden.NEW_TOKENS,
        stop_ids=(),
        slots=2,
    )
    np.testing.assert_array_equal(np.array(samples.tokens), expected["greedy"])


def test_transformers_opens_what_we_save(case, tmp_path: pathlib.Path) -> None:
    directory, expected = case
    model, params = load_hf(directory)
    save_hf(tmp_path / "out", model, params, max_shard_bytes=50_000)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert theirs.dtype == torch.float32
    mask = np.arange(expected["tokens"].shape[1])[None] < expected["lengths"][:, None]
    with torch.no_grad():
        logits = theirs(
            input_ids=torch.tensor(expected["tokens"]).long(), attention_mask=torch.tensor(mask).long()
        ).logits.numpy()
    np.testing.assert_array_equal(logits[mask], expected["logits"][mask])


def test_shards_of_transformers_load_and_ours_have_its_order(case, tmp_path: pathlib.Path) -> None:
    directory, _ = case
    model, params = load_hf(directory)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(directory)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = load_hf(tmp_path / "shards")[1]
    jax.tree.map(np.testing.assert_array_equal, again, params)
    tied = {"lm_head.weight"} if model.config.tie_embeddings else set()
    ours = [name for name, _, _ in in_file_order(tensors(model.config))]
    assert ours == [name for name in theirs.state_dict() if name not in tied]


def test_bfloat16_export_opens_in_bfloat16(tmp_path: pathlib.Path) -> None:
    path = pathlib.Path(__file__).parent / "golden" / "qwen2_tied"
    model, params = load_hf(path, param_dtype="bfloat16")
    save_hf(tmp_path / "out", model, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    ours = np.asarray(params["embed"]["embedding"].astype("float32"))
    np.testing.assert_array_equal(theirs.get_input_embeddings().weight.float().detach().numpy(), ours)
