"""What README tells a newcomer to type and to set exists, and means what it says."""

import importlib.util
import pathlib
import re
import shlex
import subprocess

import pytest

from selfplay_jax import config as configs
from selfplay_jax import main, report, sample
from selfplay_jax.evaluation import lm_eval, parse, suites
from selfplay_jax.evaluation.evaluate import EVALUATIONS
from selfplay_jax.methods import METHODS, check_fields
from selfplay_jax.models import inspect

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "scales")
README = (ROOT / "README.md").read_text()
TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands(text):
    """The commands of the bash blocks, continued lines joined, comments dropped."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = commands(README)
PARSERS = {
    "selfplay_jax.sample": sample,
    "selfplay_jax.evaluation.lm_eval": lm_eval,
    "selfplay_jax.models.inspect": inspect,
}
RUNS = [words[3:] for words in COMMANDS if words[:3] == ["python", "-m", "selfplay_jax.main"]]


def test_every_command_is_of_a_kind_that_is_checked():
    assert len(COMMANDS) >= 15
    for words in COMMANDS:
        if words[0] == "make":
            assert words[1] in TARGETS, words
        elif words[0].startswith("launch/"):
            assert (ROOT / words[0]).is_file()
            dry = [words[0], "--dry-run", *words[1:]]
            done = subprocess.run(dry, cwd=ROOT, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0 and done.stdout, done.stderr
        elif words[0] == "source":
            assert words[1:] == [".venv/bin/activate"]
        else:
            assert words[:2] == ["python", "-m"], words
            assert importlib.util.find_spec(words[2]) is not None
            checked = ("selfplay_jax.main", "selfplay_jax.report", "selfplay_jax.preflight", *PARSERS)
            assert words[2] in checked, f"check this command too: {words}"


@pytest.mark.parametrize("arguments", RUNS, ids=lambda words: " ".join(words)[:60])
def test_flags_parse_and_make_a_valid_config(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    config, workdir = main.read_flags(arguments)
    configs.check(config)
    check_fields(config.method, config.loss)
    assert workdir.startswith("runs/")
    for argument in arguments:
        override = re.fullmatch(r"--config\.([\w.]+)=(.*)", argument)
        if override:
            value = configs.flat(config)[override.group(1)]
            assert type(value)(_read(override.group(2), value)) == value


def _read(text, like):
    return {"True": True, "False": False}[text] if isinstance(like, bool) else text


def test_a_flag_that_does_not_exist_would_be_noticed(monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(main.UserError, match="no field"):
        main.read_flags([*RUNS[0], "--config.data.sorce=x"])


def test_the_real_runs_say_all_that_the_builtin_game_set(monkeypatch):
    """A run on real data must not silently keep the built-in game's tiny limits."""
    monkeypatch.chdir(ROOT)
    for arguments in RUNS:
        config, _ = main.read_flags(arguments)
        if config.data.source != "builtin":
            limits = (config.data.max_prompt_tokens, config.data.max_response_tokens, config.sampling.max_new_tokens)
            assert min(limits) > 200, arguments
            assert config.data.examples in (0, 50000), arguments
            assert config.sampling.max_new_tokens <= config.data.max_response_tokens, arguments


def test_other_commands_parse():
    modules = [words for words in COMMANDS if words[1:2] == ["-m"] and words[2] in PARSERS]
    assert {words[2] for words in modules} == set(PARSERS)
    for words in modules:
        PARSERS[words[2]].parser().parse_args(words[3:])
    assert all(f"`{name}`" in README for name in suites.SUITES)


def test_presets_and_evaluations_named_in_the_text_exist():
    presets = {preset for file in FILES for preset in importlib.import_module(f"configs.{file}").PRESETS}
    named = re.search(r"^Presets: (.*?);", README, re.MULTILINE | re.DOTALL).group(1)
    assert set(re.findall(r"`([\w.]+)`", named)) == presets
    listed = re.search(r"`config\.evaluation\.run`: (.*?)\n- ", README, re.DOTALL).group(1)
    names = set(re.findall(r"`(\w+)`", listed))
    assert set(EVALUATIONS) <= names
    parse(re.search(r'`"(likelihood,.*?)"`', listed).group(1))


def test_reports_commands_parse(capsys):
    for words in (words for words in COMMANDS if words[2:3] == ["selfplay_jax.report"]):
        assert report.main([*words[3:-1], "no/such/run"] if len(words) == 4 else [*words[3:]]) == 1
        assert "no run directory" in capsys.readouterr().err  # understood, only the runs are not there


def test_make_targets_named_in_the_text_exist():
    named = set(re.findall(r"`make ([a-z]+)", README))
    assert named and named <= TARGETS


def test_every_config_field_named_in_the_text_exists():
    known = set(configs.flat(configs.base()))
    for method in METHODS:
        known |= {f"loss.{field}" for field in METHODS[method].fields}
    named = set(re.findall(r"\bconfig\.([a-z_]+(?:\.[a-z_]+)*)(?![\w.]*\()", README)) - {"py", "json"}
    assert len(named) > 25
    assert named <= known


def test_choices_named_in_the_text_are_the_config_s():
    from selfplay_jax.data.templates import KINDS

    template = re.search(r"`config\.data\.template`: (.*?)\. The\s+same", README, re.DOTALL).group(1)
    assert all(f"`{kind}`" in template for kind in KINDS)
    export = re.search(r"`config\.export`: (.*?)\. Exports", README, re.DOTALL).group(1)
    assert set(re.findall(r"`(\w+)`", export)) == {"none", "final", "best", "every"}


def test_every_method_has_a_row_a_config_and_a_command():
    rows = {
        row.lower().replace("-", "") for row in re.findall(r"^\| \[?([\w-]+)\]?[^|]*\|[^|]*\|[^|]*\|", README, re.M)
    }
    files = [argument for words in RUNS for argument in words if "--config=" in argument]
    used = {pathlib.Path(re.split("[=:]", argument)[1]).stem for argument in files}
    assert set(METHODS) <= rows
    assert set(METHODS) == used == set(FILES)


def test_links_and_pictures_are_there():
    shown = re.sub(r"<!--.*?-->", "", README, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)#]+)\)", shown):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_papers_and_exit_codes():
    for paper in ("2401.01335", "2601.08198", "2605.09922"):
        assert f"https://arxiv.org/abs/{paper}" in README
    assert f"| {main.RESUMABLE} |" in README


def test_short_and_from_nowhere_in_particular():
    assert len(README.splitlines()) < 240
    assert not re.search(r"/(work|opt|home|root|tmp)/", README)
