"""Configs, overrides and the command line: every preset loads, every mistake is one clear sentence."""

import json
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from selfplay_jax import config as configs
from selfplay_jax import main, metrics
from selfplay_jax.config import base, build, check, difference, flat
from selfplay_jax.errors import UserError
from selfplay_jax.methods import METHODS, check_fields, plan

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if "def get_config(" in path.read_text())
SPIN = f"--config={ROOT}/configs/spin.py"
TPAW = f"--config={ROOT}/configs/tpaw.py"


def presets(file: pathlib.Path) -> list[str]:
    """The presets of a config file, from the sentence that lists them."""
    with pytest.raises(UserError, match="has no preset") as error:
        main.read_flags([f"--config={file}:no such preset"])
    return re.search(r"it has (.*)\.$", str(error.value)).group(1).split(", ")


@pytest.fixture
def signals():
    """Puts back the signal handlers that main.main takes over."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN])
def test_a_hangup_asks_to_stop_but_under_nohup(signals, before):
    signal.signal(signal.SIGHUP, before)
    wish = main.Signals()
    signal.raise_signal(signal.SIGHUP)
    assert wish.asked == (before == signal.SIG_DFL)


def test_there_is_a_config_for_every_method():
    assert {file.stem for file in FILES} >= set(METHODS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_preset_loads_and_passes_its_checks(file):
    names = presets(file)
    assert names[0] == "demo"
    for name in names:
        config, workdir = main.read_flags([f"--config={file}:{name}"])
        check(config)
        check_fields(config.method, config.loss)
        for t in range(4):
            plan(config.method, config.loss, round_index=t, window=config.window)
        assert (config.method, config.preset) == (file.stem, name)
        assert workdir == (config.workdir or f"runs/{config.method}-{config.preset}")
        assert config.is_locked
        assert set(flat(config)) == set(flat(base())) | {f"loss.{field}" for field in METHODS[file.stem].fields}
    default, _ = main.read_flags([f"--config={file}"])
    assert default.preset == "demo"


def test_overrides_of_every_type_and_the_workdir():
    numbers = ["--config.rounds=7", "--config.train.learning_rate=2e-6", "--config.loss.eta=3", "-config.seed=5"]
    others = ["--config.loss.kind=hinge", "--noconfig.loss.target_weighting", "--config.sampling.sharded_weights=true"]
    config, workdir = main.read_flags([TPAW, "--workdir=/somewhere", *numbers, *others])
    assert workdir == "/somewhere"
    assert (config.rounds, config.train.learning_rate, config.loss.eta, config.seed) == (7, 2e-6, 3.0, 5)
    assert (config.loss.kind, config.loss.target_weighting, config.sampling.sharded_weights) == ("hinge", False, True)
    assert main.read_flags([TPAW, "--config.workdir=/there"])[1] == "/there"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], r"--config=configs/tpaw\.py"),
        ([SPIN, TPAW], "once"),
        ([f"--config={ROOT}/configs/tpw.py"], r"no config file .*tpw\.py; .*tpaw\.py"),
        ([f"--config={ROOT}/configs/scales.py"], r"scales\.py defines no get_config; .*spin\.py"),
        ([f"--config={ROOT}/pyproject.toml"], r"pyproject\.toml defines no get_config"),
        ([f"{TPAW}:dem"], r"no preset 'dem' \(did you mean demo\?\); it has demo"),
        ([TPAW, "--config.train.learning_rat=1"], r"no field 'train\.learning_rat'; did you mean config\.train\.learn"),
        ([TPAW, "--config.learning_rate=1"], r"no field 'learning_rate'; did you mean .*config\.train\.learning_rate"),
        ([SPIN, "--config.loss.eta=1"], r"no field 'loss\.eta'"),
        ([TPAW, "--noconfig.loss.target_weightin"], r"did you mean config\.loss\.target_weighting"),
        ([TPAW, "--config.loss=1"], r"config\.loss is a section, not a field; it has .*config\.loss\.lam, "),
        ([TPAW, "--config.rounds=two"], r"config\.rounds.*two"),
        ([TPAW, "--config.rounds=2.5"], r"config\.rounds.*2\.5"),
        ([TPAW, "--config.train.learning_rate=fast"], r"config\.train\.learning_rate.*fast"),
        ([TPAW, "--config.sampling.sharded_weights=maybe"], r"config\.sampling\.sharded_weights.*maybe"),
        ([TPAW, "--wrkdir=x"], "wrkdir.*workdir"),
        ([TPAW, "extra"], "unexpected argument 'extra'"),
        ([TPAW, "config.rounds=2"], r"unexpected argument 'config\.rounds=2'"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_sentence_and_exit_code_1(argv, says, capsys):
    assert main.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and re.search(says, err), err
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith((".\n", "?\n"))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.optimizer=adam", r"config\.train\.optimizer='adam' is not one of .*\(did you mean adamw\?\)"),
        ("train.schedule=cosin", "cosine"),
        ("export=everything", r"config\.export"),
        ("cut_responses=keeps", "did you mean keep"),
        ("model.compute_dtype=float64", "float32, bfloat16"),
        ("window=0", r"config\.window=0 must be at least 1"),
        ("train.batch_size=0", r"config\.train\.batch_size=0 must be at least 1"),
        ("rounds=-1", r"config\.rounds=-1 must be at least 0"),
        ("sampling.temperature=-0.5", r"config\.sampling\.temperature"),
        ("opponents_per_prompt=9", r"opponents_per_prompt=9 must not exceed config\.samples_per_prompt=8"),
        ("sampling.top_p=0", r"config\.sampling\.top_p=0\.0 must be in \(0, 1\]"),
        ("sampling.top_p=1.5", r"config\.sampling\.top_p"),
        ("train.warmup=1.0", r"config\.train\.warmup=1\.0 is a share"),
        ("sft.warmup=-0.1", r"config\.sft\.warmup"),
        ("train.accumulate=3", r"config\.train\.accumulate=3 must divide config\.train\.batch_size=25"),
        ("loss.kind=square", r"config\.loss\.kind='square' is not one of logistic, hinge, exponential"),
    ],
)
def test_a_value_that_cannot_work_names_its_field(override, says, signals, capsys, tmp_path):
    argv = [TPAW, f"--config.{override}", f"--workdir={tmp_path / 'run'}", "--config.compilation_cache="]
    assert main.main(argv) == 1
    err = capsys.readouterr().err
    assert re.search(says, err) and err.count("\n") == 1, err
    assert not (tmp_path / "run").exists()  # nothing is written for a run that cannot start


def test_build_fills_the_preset_and_locks():
    config = build("toy", {"x": 1.0}, {"demo": lambda c: c.update(rounds=9), "big": lambda c: None}, None)
    assert (config.method, config.preset, config.rounds, config.loss.x) == ("toy", "demo", 9, 1.0)
    assert build("toy", {}, {"demo": lambda c: None, "big": lambda c: None}, "big").preset == "big"
    with pytest.raises(AttributeError, match="roundz"):
        config.roundz = 3
    with pytest.raises(UserError, match=r"toy has no preset 'bog' \(did you mean big\?\); it has demo, big\."):
        build("toy", {}, {"demo": lambda c: None, "big": lambda c: None}, "bog")


def test_base_gives_a_fresh_config_every_time():
    one = base()
    one.train.epochs = 77
    assert base().train.epochs != 77


def recorded(config, tmp_path):
    """The config as a workdir keeps it."""
    metrics.write_json(tmp_path / "config.json", json.loads(config.to_json()))
    return metrics.read_json(tmp_path / "config.json")


def test_the_same_config_is_no_difference(tmp_path):
    for file in FILES:
        config, _ = main.read_flags([f"--config={file}"])
        assert difference(recorded(config, tmp_path), config) is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("loss.lam=0.25", "config.loss.lam is 5.0 there and 0.25 here"),
        ("seed=3", "config.seed is 0 there and 3 here"),
        ("train.optimizer=rmsprop", "config.train.optimizer is 'adamw' there and 'rmsprop' here"),
        ("loss.mix_previous=false", "config.loss.mix_previous is True there and False here"),
    ],
)
def test_difference_names_the_field_and_both_values(override, says, tmp_path):
    old, _ = main.read_flags([SPIN])
    new, _ = main.read_flags([SPIN, f"--config.{override}"])
    assert difference(recorded(old, tmp_path), new) == says


def test_difference_of_methods_and_of_fields_that_only_one_has(tmp_path):
    spin, tpaw = main.read_flags([SPIN])[0], main.read_flags([TPAW])[0]
    assert difference(recorded(spin, tmp_path), tpaw) == "config.method is 'spin' there and 'tpaw' here"
    tpaw.method = "spin"
    assert (
        difference(recorded(spin, tmp_path), tpaw) == "config.loss.differentiate_weights is None there and False here"
    )


def test_free_fields_may_differ(tmp_path):
    old, new = main.read_flags([SPIN])[0], main.read_flags([SPIN])[0]
    leaves = flat(new)
    for name in configs.FREE_FIELDS:
        *sections, field = name.split(".")
        section = new
        for key in sections:
            section = section[key]
        value = leaves[name]
        section[field] = f"{value}x" if isinstance(value, str) else not value if isinstance(value, bool) else value + 1
    assert difference(recorded(old, tmp_path), new) is None
    assert {"rounds", "workdir", "train.checkpoint_every"} <= set(configs.FREE_FIELDS)


def command(*argv: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    argv = (sys.executable, "-m", "selfplay_jax.main", *argv)
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_an_unknown_field_in_a_real_process():
    done = command("--config=configs/tpaw.py", "--config.train.lerning_rate=1")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: the config has no field .*config\.train\.learning_rate.*\n", done.stderr)


def test_a_workdir_of_another_config_in_a_real_process(tmp_path):
    config, _ = main.read_flags([SPIN, "--config.seed=4"])
    recorded(config, tmp_path)
    metrics.write_json(tmp_path / "data.json", {})  # the run has begun
    done = command("--config=configs/spin.py", f"--workdir={tmp_path}", "--config.compilation_cache=")
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"error: .* config\.seed is 4 there and 0 here\. .*--workdir.*\n", done.stderr)
    assert metrics.read_json(tmp_path / "config.json")["seed"] == 4


def test_a_run_that_stopped_before_it_began_takes_another_config(tmp_path, signals, capsys):
    flags = [SPIN, f"--workdir={tmp_path / 'run'}", "--config.compilation_cache="]
    assert main.main([*flags, "--config.model.path=/no/such/model"]) == 1
    assert main.main([*flags, "--config.model.path=/neither/this"]) == 1
    assert "/neither/this" in capsys.readouterr().err.splitlines()[-1]


def test_a_folder_that_holds_something_else_is_not_taken(tmp_path, signals, capsys):
    (tmp_path / "thesis.tex").write_text("x")
    assert main.main([SPIN, f"--workdir={tmp_path}", "--config.compilation_cache="]) == 1
    err = capsys.readouterr().err
    assert "is not empty and holds no run" in err and err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
