"""Schedules by round, and every preset of every config."""

import importlib
import pathlib

import pytest

from selfplay_jax import config as configs
from selfplay_jax import game
from selfplay_jax.errors import UserError
from selfplay_jax.methods import METHODS

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture
def tpaw():
    return importlib.import_module("configs.tpaw").get_config()


def test_the_last_value_stays(tpaw):
    tpaw.by_round = "train.learning_rate=5e-7,1e-7; loss.lam=0.1,0.1,5;loss.player_weighting=True,false"
    configs.check(tpaw)
    seen = [configs.of_round(tpaw, t) for t in range(4)]
    assert [c.train.learning_rate for c in seen] == [5e-7, 1e-7, 1e-7, 1e-7]
    assert [c.loss.lam for c in seen] == [0.1, 0.1, 5.0, 5.0]
    assert [c.loss.player_weighting for c in seen] == [True, False, False, False]
    assert seen[0].train.epochs == tpaw.train.epochs and seen[0].sampling == tpaw.sampling
    assert tpaw.loss.lam == 5.0  # the run's own config is left as it was


def test_without_a_schedule_every_round_is_alike(tpaw):
    assert configs.of_round(tpaw, 7) == tpaw


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lam=3", r"has 'lam=3'; it reads like train\.learning_rate="),
        ("rounds=3", "with fields of loss, train, sampling"),
        ("loss.lamm=3", r"'loss\.lamm' is no field \(did you mean lam"),
        ("loss.lam=0.1,x", r"loss\.lam takes values of type float, not '0\.1,x'"),
        ("loss.player_weighting=2", "values of type bool"),
        ("train.epochs=1,1.5", "values of type int"),
        ("train.learning_rate=1e-4,-1", r"config\.train\.learning_rate=-1\.0 must be at least 0"),
        ("train.schedule=linear,cosin", r"config\.train\.schedule='cosin' is not one of .*mean cosine"),
        ("loss.lam", "it reads like"),
    ],
)
def test_what_cannot_be_is_one_sentence(tpaw, text, says):
    tpaw.by_round = text
    with pytest.raises(UserError, match=says):
        configs.check(tpaw)


def test_a_loss_field_is_checked_for_every_round(tpaw):
    tpaw.by_round = "loss.kind=logistic,hing"
    with pytest.raises(UserError, match=r"config\.loss\.kind='hing'"):
        game.check(tpaw)


def test_a_preset_that_misspells_a_field_is_an_error():
    with pytest.raises((KeyError, AttributeError), match="lerning_rate"):
        configs.build("toy", {}, {"demo": lambda c: c.train.update(lerning_rate=1.0)}, None)


PRESETS = [(method, preset) for method in METHODS for preset in importlib.import_module(f"configs.{method}").PRESETS]
SCALES = {"gsm8k_qwen2.5_1.5b", "ultrachat_qwen2.5_1.5b", "ultrachat_llama3.1_8b", "ultrachat_zephyr_7b"}


def test_every_method_has_every_scale():
    for method in METHODS:
        names = {preset for m, preset in PRESETS if m == method}
        assert names == {"demo"} | SCALES - ({"gsm8k_qwen2.5_1.5b"} if method == "dpo" else set()), method


@pytest.mark.parametrize(("method", "preset"), PRESETS, ids=lambda value: value)
def test_every_preset_is_valid_and_says_how_to_run_it(method, preset):
    module = importlib.import_module(f"configs.{method}")
    config = module.get_config(preset)
    game.check(config)
    assert config.method == method and config.preset == preset
    text = module.PRESETS[preset].__doc__
    if preset != "demo":
        assert f"--config=configs/{method}.py:{preset}" in text
        assert config.model.compute_dtype == "bfloat16" and config.data.source.count("/") == 1
        assert config.data.max_prompt_tokens + config.data.max_response_tokens <= 2048
        assert config.loss.get("tolerance", 1e-3) == 1e-3


def test_the_papers_settings():
    """METHOD.md's numbers."""
    spin = importlib.import_module("configs.spin").get_config("ultrachat_zephyr_7b")
    rounds = [configs.of_round(spin, t) for t in range(spin.rounds)]
    assert [c.train.learning_rate for c in rounds] == [5e-7, 5e-7, 1e-7, 1e-7]
    assert [c.loss.lam for c in rounds] == [0.1, 0.1, 0.1, 5.0]
    train = spin.train
    assert (train.optimizer, train.weight_decay, train.batch_size, train.epochs) == ("rmsprop", 0.0, 64, 2)
    assert (train.schedule, train.warmup, spin.data.examples, spin.data.turns) == ("linear", 0.1, 50_000, "first")
    assert spin.loss.mix_previous and spin.sampling.temperature == 1.0 and spin.sampling.top_p == 1.0
    tspin = importlib.import_module("configs.tspin").get_config("ultrachat_zephyr_7b")
    assert (tspin.rounds, tspin.loss.alpha, tspin.loss.beta) == (5, 1.0, 0.1)
    tpaw = importlib.import_module("configs.tpaw").get_config("ultrachat_llama3.1_8b")
    assert (tpaw.window, tpaw.loss.eta, tpaw.loss.gamma, tpaw.loss.lam) == (3, 6.0, 0.5, 0.1)
    assert tpaw.model.path == "runs/sft-ultrachat_llama3.1_8b/hf/final"
    sft = importlib.import_module("configs.sft").get_config("ultrachat_llama3.1_8b")
    assert f"runs/{sft.method}-{sft.preset}/hf/{sft.export}" == tpaw.model.path
