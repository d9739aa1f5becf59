"""Progress bars on a real terminal and without one; metrics on disk after kills, full disks and resumes."""

import errno
import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from selfplay_jax import metrics
from selfplay_jax.errors import UserError
from selfplay_jax.progress import progress, say

PHASE = """
import sys, time
from selfplay_jax.progress import progress, say
say("before")
with progress("sampling [round] 0", total=512, unit="prompts") as bar:
    for i in range(8):
        bar.advance(64)
        bar.update_text(f"loss 0.{i} [x]")
        if i == 4:
            say("a line [bold]as it is[/bold] " + "x" * 120)
            print("to stderr", file=sys.stderr)
        time.sleep(0.1)
say("after")
"""
FAILING = """
from selfplay_jax.progress import progress
with progress("training", total=10) as bar:
    bar.advance(3)
    raise KeyboardInterrupt
"""


def on_terminal(code, env=None, stdout=None):
    """Runs code with stderr (and stdout) on a pseudo-terminal of 200 columns; returns what a terminal got."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "200"} | (env or {})
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=slave, stdout=stdout or slave, stderr=slave, env=environment
    )
    os.close(slave)
    data, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([master], [], [], 1.0)[0]:
            continue
        try:
            chunk = os.read(master, 65536)
        except OSError:  # what Linux says when the last writer has closed a terminal
            break
        if not chunk:
            break
        data += chunk
    os.close(master)
    process.wait(timeout=30)
    return data.decode()


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_bar_on_a_terminal():
    output = on_terminal(PHASE)
    assert "\x1b[?25l" in output
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    text = plain(output)
    assert "sampling [round] 0 " in text
    assert "━" in text
    assert "/512 prompts" in text
    assert "prompts/s" in text
    assert re.search(r"\d:\d\d:\d\d", text), "no time left"
    assert "loss 0." in text
    assert "[x]" in text
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    assert "a line [bold]as it is[/bold] " + "x" * 120 in lines
    assert "to stderr" in lines
    assert lines.index("before") < lines.index("after")
    assert re.fullmatch(
        r"sampling \[round\] 0: 512 prompts in \d\.\d s, \S+ prompts/s, loss 0\.7 \[x\]",
        [x for x in lines if x][-2],
    )


def test_exception_restores_the_terminal():
    output = on_terminal(FAILING)
    assert output.rindex("\x1b[?25h") > output.rindex("\x1b[?25l")
    assert "KeyboardInterrupt" in output
    assert "training: 3" not in plain(output)


def test_redirected_stdout_keeps_its_lines(tmp_path):
    with (tmp_path / "out").open("wb") as file:
        output = plain(on_terminal(PHASE, stdout=file))
    lines = (tmp_path / "out").read_text().splitlines()
    assert lines == ["before", "a line [bold]as it is[/bold] " + "x" * 120, "after"]
    assert "as it is" not in output
    assert "/512 prompts" in output


def test_dumb_terminal_is_quiet():
    assert "\x1b" not in on_terminal(PHASE, env={"TERM": "dumb"})


def test_quiet_without_a_terminal():
    environment = os.environ | {"FORCE_COLOR": "1"}  # no colour where nobody looks, whatever the environment says
    done = subprocess.run(
        [sys.executable, "-c", PHASE], capture_output=True, text=True, env=environment, timeout=60, check=True
    )
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)
    assert done.stdout.splitlines()[0] == "before"
    assert done.stdout.splitlines()[-1] == "after"
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0] == "to stderr"
    assert re.fullmatch(r"sampling \[round\] 0: 512 prompts in \d\.\d s, \S+ prompts/s, loss 0\.7 \[x\]", lines[1])


def test_failed_phase_leaves_no_line_and_no_open_bar(capsys):
    with pytest.raises(ValueError, match="boom"), progress("scoring", total=4):
        raise ValueError("boom")
    assert capsys.readouterr() == ("", "")
    with progress("scoring", total=4, unit="rows", start=2) as bar:
        bar.advance(1)
    assert re.match(r"scoring: 3/4 rows in 0\.0 s, 2 already done, ", capsys.readouterr().err)


def test_one_bar_at_a_time():
    with (
        progress("outer", total=None),
        pytest.raises(RuntimeError, match="one bar at a time"),
        progress("inner", total=1),
    ):
        pass
    with progress("after", total=0):
        pass


def test_say_survives_a_poor_encoding():
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    code = "from selfplay_jax.progress import say; say('θ1 ± 2')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=environment, timeout=60, check=True)
    assert done.stdout.decode("latin-1") == "?1 ± 2\n"
    say("")


def strict(line):
    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    return json.loads(line, parse_constant=refuse)


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def row(step, **more):
    return {"kind": "train", "round": 0, "step": step, "loss": 1.0 / step} | more


def test_rows_reach_both_files(tmp_path):
    folder = tmp_path / "new" / "folder"
    with metrics.MetricsWriter(folder) as writer:
        writer.write(
            row(
                1,
                margin=jnp.float32(0.5),
                accuracy=np.float64(0.25),
                note="x\ny",
                flag=True,
                nested={"a": np.arange(2)},
            )
        )
        writer.write(row(2, margin=math.nan, loss=-math.inf, time=12.5))
        writer.write({"kind": "eval", "round": 0, "step": 2, "sampled_accuracy": 0.5})
    first, second, third = metrics.read(folder / "metrics.jsonl")
    assert (first["margin"], first["accuracy"], first["note"], first["nested"]) == (
        0.5,
        0.25,
        "x\ny",
        {"a": [0, 1]},
    )
    assert abs(first["time"] - time.time()) < 60
    assert second["time"] == 12.5
    assert math.isnan(second["margin"])
    assert second["loss"] == -math.inf
    assert third["kind"] == "eval"
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [strict(line)["step"] for line in lines] == [1, 2, 2]
    assert strict(lines[1])["margin"] == "NaN"
    curves = scalars(folder)
    assert set(curves) == {"train/loss", "train/margin", "train/accuracy", "eval/sampled_accuracy"}
    assert curves["train/loss"] == [(1, 1.0), (2, -math.inf)]


def test_resume_drops_what_will_be_computed_again(tmp_path):
    for resume, steps in ((None, range(1, 9)), (5, range(6, 11)), (9, range(10, 13))):
        writer = metrics.MetricsWriter(tmp_path, resume_step=resume)
        for step in steps:
            writer.write(row(step, attempt=resume or 0))
        writer.write({"kind": "eval", "round": 0, "step": 99, "n": 500})
        writer.close()
        writer.close()
        with (tmp_path / "metrics.jsonl").open("ab") as file:
            file.write(b'{"kind": "train", "step": 7, "lo\xce')
    rows = metrics.read(tmp_path / "metrics.jsonl")
    train = [r for r in rows if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 13))
    assert [r["attempt"] for r in train] == [0] * 5 + [5] * 4 + [9] * 3
    assert sum(r["kind"] == "eval" for r in rows) == 3
    assert [step for step, _ in scalars(tmp_path)["train/loss"]] == list(range(1, 13))
    sizes = [file.stat().st_size for file in sorted((tmp_path / "tensorboard").iterdir())]
    assert len(sizes) == 2
    assert sizes[0] == 0


def test_resume_from_the_start_keeps_no_training(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(row(1))
    with metrics.MetricsWriter(tmp_path, resume_step=0):
        assert metrics.read(tmp_path / "metrics.jsonl") == []


def test_a_running_tensorboard_sees_no_step_twice(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = metrics.MetricsWriter(tmp_path)
    for step in range(1, 9):
        first.write(row(step))
    first.flush()
    live = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert len(live.Scalars("train/loss")) == 8
    with metrics.MetricsWriter(tmp_path, resume_step=5) as second:
        for step in range(6, 11):
            second.write(row(step))
    live.Reload()
    assert [event.step for event in live.Scalars("train/loss")] == list(range(1, 11))
    first.close()


def test_kill_leaves_at_most_a_torn_last_line(tmp_path):
    code = (
        "import sys; from selfplay_jax.metrics import MetricsWriter\n"
        "w = MetricsWriter(sys.argv[1]); print('ready', flush=True)\n"
        "for s in range(1, 10**9): w.write({'kind': 'train', 'round': 0, 'step': s, 'text': 'é' * 500})"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    rows = metrics.read(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(1, len(rows) + 1))
    assert rows
    with metrics.MetricsWriter(tmp_path, resume_step=len(rows)) as writer:
        writer.write(row(len(rows) + 1))
    assert [r["step"] for r in metrics.read(tmp_path / "metrics.jsonl")] == list(range(1, len(rows) + 2))


def test_every_torn_length_is_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    good, last = b'{"step": 1}\n', b'{"step": 2, "x": "\xc3\xa9"}\n'
    for length in range(len(last) + 1):
        file.write_bytes(good + last[:length])
        whole = length >= len(last) - 1
        assert [r["step"] for r in metrics.read(file)] == ([1, 2] if whole else [1])
    assert metrics.read(tmp_path / "absent.jsonl") == []


def test_damage_in_the_middle_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        metrics.MetricsWriter(tmp_path)


def test_event_files_stay_small(tmp_path):
    names = [f"metric_{i}" for i in range(20)]
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in range(1, 201):
            writer.write(row(step, **dict.fromkeys(names, 0.1)))
    assert sum(file.stat().st_size for file in (tmp_path / "tensorboard").iterdir()) < 200 * 21 * 80


def test_write_json_is_atomic_strict_and_readable(tmp_path):
    file = tmp_path / "summary.json"
    metrics.write_json(file, {"a": np.float32(0.5), "b": [math.nan, -math.inf], "c": {"θ": jnp.int32(3)}, "d": None})
    assert strict(file.read_text())["b"] == ["NaN", "-Infinity"]
    back = metrics.read_json(file)
    assert back["a"] == 0.5
    assert math.isnan(back["b"][0])
    assert back["c"] == {"θ": 3}
    assert back["d"] is None
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]
    for text in ("{", "[]", ""):
        file.write_text(text)
        with pytest.raises(UserError, match=r"summary\.json"):
            metrics.read_json(file)


def test_full_disk_is_a_user_error_and_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "summary.json"
    metrics.write_json(file, {"a": 1})
    writer = metrics.MetricsWriter(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UserError, match="disk full"):
            metrics.write_json(file, {"a": 2})
        with pytest.raises(UserError, match="disk full"):
            writer.write(row(1))
    writer.close()
    assert metrics.read_json(file) == {"a": 1}
    assert not list(tmp_path.glob("*partial*"))
