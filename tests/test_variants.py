"""Whole runs of what is not the default: DPO on adapters, benchmarks in a run, answers from a run's checkpoint."""

import json

import numpy as np
import pytest
import safetensors.numpy
import yaml

from selfplay_jax import main, metrics, sample
from selfplay_jax.checkpoints import Checkpoints

TINY = (
    "--config.data.examples=8", "--config.data.test_examples=8", "--config.data.validation_examples=8",
    "--config.train.batch_size=8", "--config.train.epochs=2", "--config.sampling.slots=8",
    "--config.sampling.max_new_tokens=8", "--config.evaluation.batch_size=8", "--config.scoring.batch_size=8",
    "--config.compilation_cache=", "--config.sft.epochs=0",
)  # fmt: skip


def run(root, *argv):
    return main.main([f"--config={root}/configs/dpo.py", *TINY, *argv])


@pytest.fixture(scope="module")
def root(request):
    return request.config.rootpath


@pytest.fixture(scope="module")
def workdir(root, tmp_path_factory):
    """DPO with adapters and a benchmark of its own, one round and then, in a second call, another."""
    folder = tmp_path_factory.mktemp("dpo")
    tasks = folder / "tasks"
    tasks.mkdir()
    rows = [{"q": f"{a}+{a + 1}-{a}=", "options": [f"#{a + 1}", "#7", "no idea!"], "gold": 0} for a in range(10, 16)]
    (tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "toy_sums", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "rows.jsonl")}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "{{options}}",
        "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tasks / "toy_sums.yaml").write_text(yaml.safe_dump(task))
    flags = (
        f"--workdir={folder / 'run'}", "--config.lora.rank=2", "--config.export=every",
        "--config.train.learning_rate=1e-2",
        "--config.evaluation.run=likelihood:4,wins:8,lm_eval/toy_sums:5", f"--config.evaluation.lm_eval_path={tasks}",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        assert run(root, *flags, "--config.rounds=1") == 0
        assert run(root, *flags, "--config.rounds=2") == 0
    return folder / "run"


def test_a_round_compares_chosen_with_rejected_and_moves_adapters_alone(workdir):
    first, second = (metrics.read_json(workdir / "rounds" / f"00{t}" / "summary.json") for t in (0, 1))
    assert first["players"] == second["players"] == [0]
    assert first["cells"] == {"computed": 2, "reused": 0}
    assert second["cells"] == {"computed": 0, "reused": 2}
    assert "responses" not in first and not list(workdir.glob("rounds/*/responses.parquet"))
    assert first["train"]["loss_first"] == pytest.approx(np.log(2), abs=1e-5)
    assert second["train"]["loss_last"] < first["train"]["loss_first"] - 0.01
    players = Checkpoints(workdir / "checkpoints", window=3)
    assert players.players() == [0, 1, 2]
    players.close()
    sizes = [sum(f.stat().st_size for f in (workdir / "checkpoints/players" / str(i)).rglob("*")) for i in range(3)]
    assert max(sizes) < 250_000  # the model has 400,000 bytes
    tensors = [safetensors.numpy.load_file(workdir / f"hf/theta_{i:03d}/model.safetensors") for i in range(3)]
    name = "model.layers.0.self_attn.q_proj.weight"
    assert all(np.abs(tensors[i][name] - tensors[i + 1][name]).max() > 1e-4 for i in range(2))
    np.testing.assert_array_equal(tensors[0]["model.norm.weight"], tensors[2]["model.norm.weight"])


def test_evaluations_land_in_summary_metrics_and_report(workdir, capsys):
    from selfplay_jax import report

    for folder in ("sft", "rounds/000", "rounds/001"):
        result = metrics.read_json(workdir / folder / "summary.json")["eval"]
        assert 0 <= result["lm_eval/toy_sums/acc"] <= 1 and result["lm_eval/toy_sums/acc_se"] >= 0
        assert result["wins_n"] == 8 and 0 <= result["wins_logp"] <= 1
        assert ("wins_reward" in result) == (folder != "sft")
        rows = [row for row in metrics.read(workdir / folder / "metrics.jsonl") if row["kind"] == "eval"]
        assert len(rows) == 1 and rows[0]["lm_eval/toy_sums/acc"] == result["lm_eval/toy_sums/acc"]
    assert "lm_eval/toy_sums/acc" in report.table(workdir)


def test_answers_of_a_checkpoint_are_those_of_its_export(workdir, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "31+24-17="}\n{"prompt": "12+13-10="}\n')
    answers = []
    for model, more in ((workdir, ["--player=1"]), (workdir / "hf" / "theta_001", [])):
        output = tmp_path / f"{len(answers)}.jsonl"
        flags = ["--max_new_tokens=8", "--samples=3", "--slots=8", f"--output={output}", *more]
        assert sample.main([f"--model={model}", f"--prompts={tmp_path / 'prompts.jsonl'}", *flags]) == 0
        answers.append([json.loads(line) for line in output.read_text().splitlines()])
    for one, other in zip(*answers, strict=True):
        assert one.pop("logp") == pytest.approx(other.pop("logp"), abs=1e-4)
        assert one == other
    assert [(row["id"], row["sample"]) for row in answers[0]] == [(i, s) for i in range(2) for s in range(3)]
    assert answers[0][0]["prompt"] == "31+24-17=" and len({row["response"] for row in answers[0]}) > 1


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--player=7"], "holds no player 7; it holds"),
        (["--temperature=-1"], "temperature must be 0"),
        (["--prompts=nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--model=/no/such"], "no directory /no/such"),
        (["--template=chatlm"], "did you mean 'chatml'"),
        (["--column=question"], "has no column 'question'"),
    ],
)
def test_sampling_s_mistakes_are_one_sentence(workdir, tmp_path, capsys, flags, says):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "31+24-17="}\n')
    base = [f"--model={workdir}", f"--prompts={prompts}", f"--output={tmp_path / 'out.jsonl'}"]
    assert sample.main([*base, *flags]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.evaluation.run=lm_eval/toy_sum"], "lm-eval has no task or group 'toy_sum'"),
        (["--config.evaluation.run=greedily"], "did you mean 'greedy'"),
        (["--config.lora.rank=2", "--config.lora.targets=k,qq"], "config.lora.targets has 'qq'"),
        (["--config.lora.rank=-2"], "config.lora.rank=-2 must be at least 0"),
        (["--config.by_round=loss.beta=x"], "loss.beta takes values of type float"),
    ],
)
def test_a_run_s_mistakes_are_one_sentence(root, tmp_path, capsys, flags, says):
    assert run(root, f"--workdir={tmp_path / 'run'}", *flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1


def test_dpo_says_what_data_it_needs(root, shared, tmp_path, capsys):
    flags = [f"--config.data.source={shared / 'data/gsm8k/test.jsonl'}", "--config.data.template=plain"]
    flags += ["--config.data.max_prompt_tokens=1000", "--config.data.max_response_tokens=1000", "--config.data.cache="]
    assert run(root, f"--workdir={tmp_path / 'run'}", *flags) == 1
    assert "compares with dispreferred answers, and" in capsys.readouterr().err


def test_an_export_asks_as_the_run_did(workdir, root, tmp_path, capsys):
    """A run with a named template leaves it in the export, and `sample` uses it for both."""
    run_dir = tmp_path / "run"
    flags = ["--config.data.template=alpaca", "--config.rounds=0", "--config.data.max_prompt_tokens=64"]
    assert run(root, f"--workdir={run_dir}", *flags, "--config.evaluation.run=", "--config.export=none") == 0
    # Asked for afterwards: exports of what is still there.
    assert run(root, f"--workdir={run_dir}", *flags, "--config.evaluation.run=", "--config.export=every") == 0
    (tmp_path / "p.jsonl").write_text('{"prompt": "31+24-17="}\n')
    rows = []
    for model in (run_dir, run_dir / "hf" / "theta_000"):
        output = tmp_path / "out.jsonl"
        more = ["--max_new_tokens=4", "--temperature=0", f"--output={output}"]
        assert sample.main([f"--model={model}", f"--prompts={tmp_path / 'p.jsonl'}", *more]) == 0
        rows.append(json.loads(output.read_text()))
    assert rows[0] == rows[1]
    assert rows[0]["prompt"] == "### Instruction: 31+24-17=\n\n### Response:"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--config.train.learning_rate=nan"], "config.train.learning_rate=nan must be a finite number"),
        (["--config.evaluation.answer=("], "is no regular expression"),
        (["--config.export=best", "--config.data.validation_examples=0"], "ranks checkpoints on validation examples"),
        (["--config.by_round=loss.beta=1;loss.beta=2"], "names loss.beta twice"),
    ],
)
def test_what_would_show_late_is_said_at_once(root, tmp_path, capsys, flags, says):
    assert run(root, f"--workdir={tmp_path / 'run'}", *flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ") and says in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_is_one_sentence(root, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(root, f"--workdir={path}") == 1
        err = capsys.readouterr().err
        assert err.startswith("error: the workdir ") and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["--output=/no/such/folder/x.jsonl", "--seed=-1", "--limit=-1", "--slots=0"])
def test_sampling_checks_before_it_starts(workdir, tmp_path, capsys, flag):
    base = [f"--model={workdir}", "--prompts=unread.jsonl", f"--output={tmp_path / 'out.jsonl'}"]
    assert sample.main([*base, flag]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: {flag.split('=')[0]} ") and err.count("\n") == 1


def test_adapters_alone_are_no_model(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n')
    flags = [f"--prompts={tmp_path / 'p.jsonl'}", f"--output={tmp_path / 'out.jsonl'}"]
    assert sample.main([f"--model={tmp_path}", *flags]) == 1
    assert "holds adapters alone: give the run's workdir" in capsys.readouterr().err
