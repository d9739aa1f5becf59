"""What a user can cause, through the command line: exit code 1, one sentence that names the culprit, nothing lost."""

import json
import pathlib
import shutil
import subprocess

import pytest

from selfplay_jax import main
from selfplay_jax.data import builtin

ROOT = pathlib.Path(__file__).resolve().parents[1]
_SMALL = [
    "--config.data.examples=8", "--config.data.test_examples=2", "--config.data.validation_examples=2",
    "--config.sft.epochs=1", "--config.sft.batch_size=4", "--config.samples_per_prompt=1",
    "--config.opponents_per_prompt=1", "--config.evaluation.every=0", "--config.compilation_cache=",
]  # fmt: skip


@pytest.fixture
def error(tmp_path, capsys, monkeypatch):
    """Runs the command line with overrides; returns the sentence it ended with."""
    monkeypatch.setattr(main, "Signals", type("NoSignals", (), {"asked": False}))

    def run(*overrides, workdir=tmp_path / "run"):
        argv = [f"--config={ROOT}/configs/tpaw.py", f"--workdir={workdir}", *_SMALL, *overrides]
        code = main.main([f"--config.{o}" if not o.startswith("--") else o for o in argv])
        message = capsys.readouterr().err
        assert code == 1, message
        last = message.strip().splitlines()[-1]
        assert last.startswith("error: ")
        assert "Traceback" not in message
        return last

    return run


def jsonl(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


GOOD = [{"prompt": f"{n}+1-1=", "response": f"#{n}"} for n in range(10, 30)]


def test_missing_data_file_names_its_neighbours(error, tmp_path):
    jsonl(tmp_path / "train.jsonl", *GOOD)
    said = error(f"data.source={tmp_path}/trian.jsonl")
    assert "trian.jsonl" in said and "train.jsonl" in said


def test_malformed_line_is_named_by_file_and_line(error, tmp_path):
    file = jsonl(tmp_path / "train.jsonl", *GOOD[:3], '{"prompt": "1+1\n', *GOOD[3:])
    assert f"{file}:4" in error(f"data.source={file}")


def test_a_run_that_stopped_at_its_data_takes_another_config(error, tmp_path):
    """The remedy that the sentence names must work in the same workdir."""
    file = jsonl(tmp_path / "train.jsonl", *GOOD[:3], "nonsense\n", *GOOD[3:])
    source = [f"data.source={file}", "data.cache="]
    assert "set data.on_bad_record to 'skip'" in error(*source)
    assert "max_prompt_tokens" in error(*source, "data.on_bad_record=skip", "data.max_prompt_tokens=2")
    (tmp_path / "run/data.json").write_text("{}")  # as if it had begun
    assert "holds a run with another config" in error(*source)


@pytest.mark.parametrize("row", [{"prompt": " ", "response": "#1"}, {"prompt": "1+1", "response": ""}])
def test_empty_prompt_or_response_is_named_by_line(error, tmp_path, row):
    file = jsonl(tmp_path / "train.jsonl", *GOOD[:5], row, *GOOD[5:])
    said = error(f"data.source={file}")
    assert f"{file}:6" in said and "on_bad_record" in said


def test_prompts_that_are_all_too_long_name_the_limit(error, tmp_path):
    file = jsonl(tmp_path / "train.jsonl", *GOOD)
    assert "max_prompt_tokens" in error(f"data.source={file}", "data.max_prompt_tokens=2")


def test_tokenizer_larger_than_the_vocabulary(error, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(builtin.BASE, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 10}))
    assert "vocab_size is 10" in error(f"model.path={model}")


def test_missing_model_directory(error, tmp_path):
    assert "no-such-model" in error(f"model.path={tmp_path}/no-such-model")


def test_unknown_loss_field_and_kind(error):
    assert "config.loss.kind='logistik'" in error("loss.kind=logistik")


def test_values_out_of_range_name_the_field(error):
    assert "config.opponents_per_prompt=3" in error("opponents_per_prompt=3")
    assert "config.train.optimizer='adam'" in error("train.optimizer=adam")
    assert "mesh.fsdp=3" in error("mesh.fsdp=3")


def test_a_directory_that_is_no_run_is_left_alone(error, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("precious")
    assert "holds no run" in error(workdir=tmp_path / "thesis")
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["chapter.tex"]


def test_loss_that_is_not_finite_stops_with_its_step(error, tmp_path):
    said = error("sft.learning_rate=1e15", "sft.epochs=4", "mesh.fsdp=1", "mesh.tensor=-1")
    assert "not finite at step" in said and "learning rate" in said
    rows = [json.loads(line) for line in (tmp_path / "run/sft/metrics.jsonl").read_text().splitlines()]
    assert rows and all(isinstance(row["loss"], float) for row in rows)  # the bad step is not in the record


def test_full_disk(error, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("only root may mount the small disk that this test fills")
    try:
        said = error(workdir=disk / "run")
        assert "No space left on device" in said or "disk is full" in said
        assert json.loads((disk / "run/config.json").read_text())["method"] == "tpaw"  # what was there is whole
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_unexpected_error_is_not_called_the_users(monkeypatch, capsys, tmp_path):
    """Launchers end a run at 1, and try again at other codes."""

    def fails(*_):
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("selfplay_jax.selfplay.play", fails)
    assert main.main(["--config=configs/tpaw.py", f"--workdir={tmp_path}", "--config.compilation_cache="]) == 70
    assert "ZeroDivisionError: of ours" in capsys.readouterr().err
