"""The report of synthetic runs: what it says, what it survives, and that the page is whole and harmless."""

import html.parser
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree

import numpy as np
import pytest

from selfplay_jax import metrics, report
from selfplay_jax.errors import UserError

HOSTILE = "<script>alert('x')</script>\"&é\x1b[31m"
METHODS = {"tpaw": 3, "spin": 1, "tspin": 0, "sft": 0}  # frozen players


def make_run(path, method="tpaw", rounds=3, steps=32, seed=0, sft=True, preset="demo", config=None, start=0.64):
    """A workdir like a run's: the shapes of METHOD.md's diagnostics, with noise."""
    rng = np.random.default_rng(seed)
    config = {
        "method": method,
        "preset": preset,
        "rounds": rounds,
        "seed": seed,
        "train": {"batch_size": 25},
    } | (config or {})
    metrics.write_json(_made(path) / "config.json", config)
    accuracy = start
    if sft:
        rows = [
            {
                "kind": "train",
                "round": -1,
                "step": s,
                "loss": 1.9 * math.exp(-s / 20) + 0.4 + 0.05 * rng.normal(),
                "time": 1.7e9 + s,
            }
            for s in range(1, 65)
        ]
        write_round(path / "sft", rows, -1, method, rng, accuracy, players=[])
    for t in range(rounds):
        players = list(range(t, max(-1, t - METHODS[method]), -1))
        rows = [train_row(t, s, steps, players, rng, method) for s in range(1, steps + 1)]
        accuracy += 0.04 * 0.7**t + 0.01 * rng.normal()
        write_round(path / "rounds" / f"{t:03d}", rows, t, method, rng, accuracy, players)
    return path


def train_row(t, step, steps, players, rng, method):
    x = step / steps
    noise = rng.normal(size=8)
    row = {"kind": "train", "round": t, "step": step, "time": 1.7e9 + 100 * t + step}
    row |= {
        "loss": 0.7 - 0.25 * x + 0.03 * noise[0],
        "grad_norm": 2 + abs(noise[1]),
        "update_norm": 0.01,
        "learning_rate": 3e-5,
    }
    row |= {
        "tokens_per_second": 5000 + 200 * noise[2],
        "logp_target": -5.2 + 0.1 * t + 0.1 * x + 0.15 * noise[3],
    }
    if method == "sft":
        return row
    row |= {"reward_target": 0.1 * x + 0.03 * noise[4], "reward_generated": -0.9 * x + 0.1 * noise[5]}
    row["margin"] = row["reward_target"] - row["reward_generated"]
    row |= {"accuracy": 0.5 + 0.4 * x, "higher_reward_lower_logp": 0.2 + 0.02 * noise[6]}
    row |= {"logp_generated": -6 - 1.5 * x + 0.2 * noise[7]}
    row["logp_gap"] = row["logp_target"] - row["logp_generated"]
    if method == "tpaw":
        weights = np.exp(-0.5 * rng.normal(size=len(players)) * x)
        row |= {"alpha": 6 - 3 * x, "beta_entropy": 1.0} | {
            f"beta_{j}": w for j, w in enumerate(weights / weights.sum())
        }
    return row


def write_round(folder, rows, t, method, rng, accuracy, players):
    names = [key for key in rows[0] if key not in ("kind", "round", "step", "time")]
    means = {name: float(np.mean([row[name] for row in rows])) for name in names}
    means |= {"loss_first": rows[0]["loss"], "loss_last": rows[-1]["loss"]}
    with metrics.MetricsWriter(_made(folder)) as writer:
        for row in rows:
            writer.write(row)
    evaluation = {
        "theta": t + 1,
        "n": 500,
        "greedy_accuracy": 0.97 + 0.005 * rng.normal(),
        "greedy_accuracy_se": 0.007,
    }
    evaluation |= {
        "sampled_accuracy": accuracy,
        "sampled_accuracy_se": 0.0105,
        "target_logp": -4.83 + 0.03 * t,
        "target_logp_se": 0.04,
    }
    summary = {
        "round": t,
        "method": method,
        "preset": "demo",
        "steps": len(rows),
        "train": means,
        "eval": evaluation,
    }
    summary |= {"seconds": {"train": 21.4, "evaluate": 4.2, "save": 0.3}, "padding_share": 0.112}
    if t >= 0:
        summary |= {"players": players, "cells": {"computed": 1 + 2 * len(players), "reused": 3 * t}}
        lengths = {"target_length": 21.3, "generated_length": 20.1, "finished_share": 0.985, "count": 800}
        summary |= {"responses": lengths, "seconds": {"sample": 11.3, "score": 2.1} | summary["seconds"]}
    metrics.write_json(folder / "summary.json", summary)


def _made(folder):
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class Page(html.parser.HTMLParser):
    """Checks that tags are balanced and ids unique, and collects what a browser would load or run."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.refs, self.tags, self.text = [], [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self._attrs(attrs)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self._attrs(attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def _attrs(self, attrs):
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "xlink:href", "src"):
                self.refs.append(value)
            self.refs += re.findall(r"url\((.*?)\)", value or "")
            assert not name.startswith("on")


def check_page(text):
    """A page that is well formed, loads nothing, runs nothing, and whose references all lead somewhere."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert all(ref.startswith("#") and ref[1:] in page.ids for ref in page.refs)
    assert not {"script", "img", "link", "iframe", "object", "image"} & set(page.tags)
    assert "http://" not in text
    assert "https://" not in text
    assert "@import" not in text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        xml.etree.ElementTree.fromstring(svg)
        assert not re.search(r"#0[ab]0[bc]", svg), "a marker colour was left in"
    return page


def test_round_line_says_what_happened(tmp_path):
    run = make_run(tmp_path / "run")
    line = report.round_line(json.loads((run / "rounds/002/summary.json").read_text()))
    assert "\n" not in line
    assert len(line) <= report.LINE_WIDTH
    number = r"[+-]\d\.\d+"
    assert re.fullmatch(
        rf"round 2 · loss 0\.\d+ · target {number} generated {number} margin {number}"
        r" · α 4\.\d · β \.\d\d \.\d\d \.\d\d · greedy \d\d\.\d±0\.7% sampled \d\d\.\d±1\.[01]%"
        r" · sample 11 score 2 train 21 evaluate 4 s",
        line,
    )


@pytest.mark.parametrize(
    ("summary", "expected"),
    [
        ({}, "round 0"),
        ({"round": -1, "train": {"loss": 0.5}}, "SFT · loss 0.500"),
        (
            {"round": 1, "train": {"loss": float("nan"), "margin": float("inf")}},
            "round 1 · loss nan · margin +inf",
        ),
        ({"round": 1, "train": None, "eval": None, "seconds": None, "players": None}, "round 1"),
        (
            {"round": 7, "train": {"beta_0": 1.0}, "seconds": {"train": 7200.0}},
            "round 7 · β 1.00 · train 7200 s",
        ),
        ({"round": 0, "eval": {"greedy_accuracy": 0.5}}, "round 0 · greedy 50.0%"),
    ],
)
def test_round_line_leaves_out_what_is_missing(summary, expected):
    assert report.round_line(summary) == expected


def test_round_line_never_exceeds_its_width():
    train = {"loss": 1e-9, "reward_target": -123456.0, "reward_generated": 1e9, "margin": -1e-7, "alpha": 5.9}
    train |= {f"beta_{j}": 1 / 12 for j in range(12)}
    summary = {
        "round": 12,
        "train": train,
        "players": list(range(12, 0, -1)),
        "seconds": dict.fromkeys("abcdefgh", 1e5),
    }
    line = report.round_line(summary)
    assert len(line) <= report.LINE_WIDTH
    assert line.startswith("round 12 · ")


def test_table_has_the_start_and_every_round(tmp_path):
    lines = report.table(make_run(tmp_path / "run")).splitlines()
    assert lines[0] == "run: tpaw, preset demo"
    assert [line.split("  ")[0].strip() for line in lines[3:]] == ["SFT", "round 0", "round 1", "round 2"]
    assert "64.0 ± 1.1 %" in lines[3] or "64.0 ± 1.0 %" in lines[3]
    assert len({len(line) for line in lines[1:]}) == 1
    assert "α" in lines[1]


def test_table_leaves_out_columns_nobody_filled(tmp_path):
    text = report.table(make_run(tmp_path / "run", method="sft", rounds=1))
    assert "reward" not in text
    assert "α" not in text
    assert "loss" in text


def test_html_is_self_contained_and_complete(tmp_path):
    run = make_run(tmp_path / "run")
    file = report.write_html(run)
    assert file == run / "report.html"
    text = file.read_text()
    page = check_page(text)
    assert page.tags.count("svg") == 10
    for words in (
        "Held-out accuracy",
        "Time per phase",
        "padding share",
        "98.5 %",
        "11.2 %",
        "batch_size",
        "What the numbers mean",
    ):
        assert words in page.text
    assert len(text) < 500_000


def test_html_is_deterministic(tmp_path):
    run = make_run(tmp_path / "run")
    first = report.write_html(run).read_bytes()
    assert report.write_html(run, tmp_path / "other.html").read_bytes() == first


def test_html_escapes_hostile_strings(tmp_path):
    run = make_run(tmp_path / "a<b>&run", rounds=1, preset=HOSTILE, config={HOSTILE: {"x": HOSTILE}, "method": "tpaw"})
    page = check_page(report.write_html(run).read_text())
    assert page.text.count("<script>") >= 3
    assert "\x1b" not in report.table(run)
    other = make_run(tmp_path / "_</text><script>$x^$ $", rounds=1)
    out = tmp_path / "comparison.html"
    assert report.main([str(run), str(other), "--output", str(out)]) == 0
    check_page(out.read_text())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rounds", [0, 1])
def test_every_method_and_few_rounds(tmp_path, method, rounds):
    run = make_run(tmp_path / "run", method=method, rounds=rounds, sft=rounds == 1)
    check_page(report.write_html(run).read_text())
    assert report.table(run).startswith("run: ")


def test_unfinished_round_and_missing_parts(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "rounds/002/summary.json").unlink()  # round 2 is under way
    with (run / "rounds/002/metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    (run / "rounds/000/metrics.jsonl").unlink()
    metrics.write_json(
        run / "rounds/001/summary.json",
        {"round": 1, "train": {"loss": float("nan")}, "eval": {}, "seconds": {"train": "x"}},
    )
    (run / "config.json").unlink()
    _made(run / "rounds/003")
    _made(run / "rounds/tmp-004")
    page = check_page(report.write_html(run).read_text())
    assert "round 2" in page.text
    assert "nan" in report.table(run)


def test_long_run_stays_small(tmp_path):
    run = make_run(tmp_path / "run", rounds=1, steps=2, sft=False)
    rng = np.random.default_rng(0)
    rows = [train_row(0, step, 5_000, [0], rng, "tpaw") for step in range(1, 5_001)]
    (run / "rounds/000/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(report.write_html(run).read_bytes()) < 700_000


@pytest.mark.parametrize("global_steps", [False, True])
def test_rounds_follow_each_other_on_the_step_axis(tmp_path, global_steps):
    from selfplay_jax import report_data, report_figures

    for t in range(3):
        rows = [{"kind": "train", "step": s + (10 * t if global_steps else 0), "loss": 1.0} for s in range(1, 11)]
        with metrics.MetricsWriter(tmp_path / f"rounds/{t:03d}") as writer:
            for row in rows:
                writer.write(row)
    spans = report_figures._spans(report_data.load(tmp_path).rounds)
    assert [span[2:] for span in spans] == [(0, 10), (10, 20), (20, 30)]


def test_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / name / "demo", method=name, seed=i) for i, name in enumerate(("tpaw", "spin"))]
    assert report.main([str(runs[0])]) == 0
    assert (runs[0] / "report.html").exists()
    assert "wrote " in capsys.readouterr().out
    assert report.main([str(run) for run in runs]) == 0
    out = capsys.readouterr().out
    assert "tpaw/demo" in out
    assert "spin/demo" in out
    assert "sampled: start" in out
    page = check_page((tmp_path / "comparison.html").read_text())
    assert "Where the configs differ" in page.text
    assert "seed" in page.text


@pytest.mark.parametrize("what", ["missing", "empty", "damaged", "list"])
def test_user_errors_are_one_sentence(tmp_path, capsys, what):
    folder = tmp_path / "run"
    if what != "missing":
        folder.mkdir()
    if what in ("damaged", "list"):
        make_run(folder, rounds=1)
        (folder / "rounds/000/summary.json").write_text("{" if what == "damaged" else "[]")
    assert report.main([str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(folder) in error
    with pytest.raises(UserError):
        report.table(folder)


def test_matplotlib_is_imported_only_for_the_page():
    code = "import sys, selfplay_jax.report as r; r.round_line({}); sys.exit('matplotlib' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_other_evaluations_have_a_table_of_their_own(tmp_path):
    run = make_run(tmp_path / "run", rounds=2)
    for folder, value in ((run / "rounds" / "000", 0.25), (run / "rounds" / "001", 0.5)):
        summary = metrics.read_json(folder / "summary.json")
        summary["eval"] |= {"wins_logp": value, "wins_logp_se": 0.021, "wins_n": 50, "validation_x": 1.0}
        summary["eval"] |= {"validation_x_se": 0.5, "lm_eval/toy/acc": value / 2, "lm_eval/toy/acc_se": 0.1}
        metrics.write_json(folder / "summary.json", summary)
    text = report.table(run)
    assert re.search(r"evaluation +θ0 +θ1 +θ2\n", text)
    assert re.search(r"wins_logp +– +0\.250 ± 0\.021 +0\.500 ± 0\.021", text)
    assert re.search(r"lm_eval/toy/acc +– +0\.125 ± 0\.100 ", text)
    assert "wins_n" not in text and "validation_x" not in text
    page = report.write_html(run).read_text()
    assert "More evaluations" in page and "lm_eval/toy/acc" in page
    assert "evaluation  " not in report.table(make_run(tmp_path / "plain", rounds=1))
