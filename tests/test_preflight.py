"""Preflight: names of slices, outcomes, advice, speed, the command line; with libtpu, real compiles."""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from tiny_models import PLAIN

from selfplay_jax.errors import UserError
from selfplay_jax.main import read_flags
from selfplay_jax.preflight import advise, command, hlo, shapes, speed, topologies
from selfplay_jax.preflight.compile import (
    CRASHED,
    FITS,
    LATE,
    TOO_LARGE,
    Outcome,
    compile_programs,
    diagnose,
    last_words,
)
from selfplay_jax.preflight.result import Result

ROOT = pathlib.Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)


def config_of(*flags: str, file: str = "tpaw", preset: str = "demo") -> Any:
    return read_flags([f"--config={ROOT}/configs/{file}.py:{preset}", *flags])[0]


# Slices: (name, topology name, chips, hosts), from the tables of Cloud TPU's documentation.
@pytest.mark.parametrize(
    ("name", "topology", "chips", "hosts"),
    [
        ("v5litepod-1", "v5e:1x1", 1, 1),
        ("v5litepod-8", "v5e:2x4", 8, 1),
        ("v5litepod-16", "v5e:4x4", 16, 4),
        ("v5e-16", "v5e:4x4", 16, 4),
        ("v5litepod-256", "v5e:16x16", 256, 64),
        ("v6e-8", "v6e:2x4", 8, 1),
        ("v6e-256", "v6e:16x16", 256, 64),
        ("v4-8", "v4:2x2x1", 4, 1),
        ("v4-32", "v4:2x2x4", 16, 4),
        ("v5p-8", "v5p:2x2x1", 4, 1),
        ("v5p-16", "v5p:2x2x2", 8, 2),
        ("v5p-256", "v5p:4x4x8", 128, 32),
        ("v5p-12288", "v5p:16x16x24", 6144, 1536),
        ("v5p:2x4x4", "v5p:2x4x4", 32, 8),
        ("V5P-16", "v5p:2x2x2", 8, 2),
    ],
)
def test_slice_names(name: str, topology: str, chips: int, hosts: int) -> None:
    found = topologies.find(name)
    assert (found.topology, found.chips, found.hosts, found.slices) == (topology, chips, hosts, 1)


def test_several_slices() -> None:
    found = topologies.find("2xv5p-256")
    assert (found.topology, found.slices, found.chips) == ("v5p:4x4x8", 2, 256)
    assert topologies.find("v5p-256", slices=2).chips == 256


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5p-7", "v5p-8, v5p-16"),
        ("v5litepod-5", "v5litepod-4, v5litepod-8"),
        ("v4-8192", "v4-4096"),
        ("v5e:4", "has 2 sizes, as in v5e:1x1"),
        ("v5p:2x2", "has 3 sizes"),
        ("tpu7x-8", "tpu7x:2x2x1"),
        ("h100", "Generations are v4"),
        ("v6p-16", "did you mean v6e-16"),
        ("0xv5p-8", "one slice at least"),
    ],
)
def test_slices_that_do_not_exist(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        topologies.find(name)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (640.06G) exceeds available HBM (15.75G). HLO module: jit_f.",
            (TOO_LARGE, 640.06 * 2**30),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 2.50T of 15.75G hbm. Exceeded",
            (TOO_LARGE, 2.5 * 2**40),
        ),
        ("RESOURCE_EXHAUSTED: something new", (TOO_LARGE, 0.0)),
        ("INTERNAL: Mosaic failed\nmore", ("the compiler refused it: INTERNAL: Mosaic failed", 0.0)),
    ],
)
def test_what_the_compiler_says(message: str, expected: tuple[str, float]) -> None:
    assert diagnose(message) == expected


GIB = topologies.GIB
V5E = topologies.find("v5litepod-16")


def outcome(program: str, gib: float, **fields: Any) -> Outcome:
    return Outcome(program, memory={"arguments": gib * GIB}, **fields)


def test_what_lies_beside_a_program_counts() -> None:
    assert outcome("train", 15).status(V5E) == FITS
    assert outcome("decode", 15, beside={"the policy": 1.0 * GIB}).status(V5E) == TOO_LARGE
    assert Result(V5E, [outcome("train", 1), outcome("score", 20)]).status == TOO_LARGE
    assert Result(V5E, [outcome("train", 1), Outcome("score", problem=CRASHED)]).status == CRASHED


class FakeCompiler:
    """Says that a config takes what a formula says, and remembers what it was asked."""

    def __init__(self, formula: Any):
        self.formula, self.asked = formula, []

    def __call__(self, config: Any, names: Any, limit: float | None) -> list[Outcome]:
        self.asked.append(list(names))
        return [outcome(name, self.formula(config)) for name in names]


def tried_flags(tried: list[advise.Tried]) -> list[str]:
    return [f"{one.flags} {'yes' if one.status == FITS else 'no'}" for one in tried]


def test_advice_for_training_goes_from_harmless_to_drastic() -> None:
    config = config_of(preset="ultrachat_llama3.1_8b")  # remat full, batch 64
    compiler = FakeCompiler(lambda c: 40.0 / (c.mesh.tensor if c.model.param_dtype == "bfloat16" else 1))
    tried = advise.advise(
        config, shapes.SHAPES["llama-3.1-8b"], V5E, [outcome("train", 40), outcome("score", 3)], compiler, seconds=60
    )
    assert tried_flags(tried) == [
        "--config.train.accumulate=2 no",
        "--config.train.accumulate=4 no",
        "--config.mesh.tensor=2 no",
        "--config.mesh.tensor=4 no",
        "--config.mesh.tensor=8 no",
        "--config.train.accumulate=4 --config.mesh.tensor=8 no",
        "--config.model.param_dtype=bfloat16 no",
        "--config.train.accumulate=4 --config.model.param_dtype=bfloat16 no",
        "--config.lora.rank=16 no",
        "--config.train.accumulate=4 --config.model.param_dtype=bfloat16 --config.lora.rank=16 no",
        "--config.train.accumulate=4 --config.model.param_dtype=bfloat16 --config.lora.rank=16 "
        "--config.mesh.tensor=8 yes",
    ]
    assert compiler.asked[0] == ["train"]
    assert compiler.asked[-1] == ["train", "score"]  # what fitted may not any more
    assert tried[0].meaning == advise.SAME
    assert tried[-1].meaning == advise.OTHER


def test_advice_ends_with_three_that_fit_or_with_the_time() -> None:
    config = config_of(preset="ultrachat_llama3.1_8b")
    shape, failing = shapes.SHAPES["llama-3.1-8b"], [outcome("decode", 40)]
    tried = advise.advise(config, shape, V5E, failing, FakeCompiler(lambda c: 1.0), seconds=60)
    assert tried_flags(tried) == [
        "--config.sampling.slots=128 yes",
        "--config.sampling.slots=64 yes",
        "--config.sampling.sharded_weights=True yes",
    ]
    late = advise.advise(config, shape, V5E, failing, FakeCompiler(lambda c: 1.0), seconds=0)
    assert [one.status for one in late] == [LATE]


def test_advice_asks_for_no_mesh_that_cannot_be() -> None:
    config = config_of("--config.model.remat=none")
    one_chip = topologies.find("v5litepod-1")
    tried = advise.advise(config, PLAIN, one_chip, [outcome("train", 40)], FakeCompiler(lambda c: 40.0), seconds=60)
    assert tried_flags(tried)[:2] == ["--config.model.remat=dots no", "--config.model.remat=full no"]
    assert not any("tensor" in one.flags for one in tried)


def test_speed_from_cycles_and_bytes() -> None:
    chip = V5E.chip
    done = outcome(
        "train", 1, flops=8e15, model_flops=6e15, tokens=1600,
        once=hlo.Traffic(cycles=3 * chip.clock, ici_bytes=chip.ici_bandwidth),
    )  # fmt: skip
    took = speed.speed(done, V5E)
    assert took is not None
    assert (took.compute, took.ici, took.hidden, took.in_turn) == (3.0, 1.0, 3.0, 4.0)
    np.testing.assert_allclose(took.mfu_hidden, 6e15 / (16 * 197e12 * 3))
    assert speed.speed(Outcome("train", problem=TOO_LARGE), V5E) is None
    loops = {"once": hlo.Traffic(cycles=chip.clock), "repeated": hlo.Traffic(cycles=2 * chip.clock)}
    for program, seconds in (("decode", 2.0), ("train", 3.0)):  # per token; once through everything
        took = speed.speed(outcome(program, 1, **loops), V5E)
        assert took is not None
        assert took.compute == seconds
    unread = speed.speed(outcome("train", 1, flops=16 * 197e12, model_flops=8 * 197e12), V5E)
    assert unread is not None
    assert (unread.compute, unread.mfu_hidden, unread.estimated) == (1.0, 0.5, False)


def test_a_round_is_as_many_runs_as_the_game_makes() -> None:
    config = config_of("--config.samples_per_prompt=2", "--config.opponents_per_prompt=1", "--config.train.epochs=3")
    copies = {"fill": 2, "decode": 2}  # two hosts sample
    second = hlo.Traffic(cycles=V5E.chip.clock)
    rows = {"train": 25, "score": 10, "fill": 5, "decode": 20}
    done = [outcome(name, 1, rows=n, once=second, copies=copies.get(name, 1)) for name, n in rows.items()]
    runs = {
        phase.program: phase.runs
        for phase in speed.phases(config, done, V5E, count=100, mean_response=8, efficiency=0.5)
    }
    assert (runs["fill"], runs["decode"], runs["train"]) == (20, 40, 12)
    # θ_t on y, y_t, y_{t-1}, y_{t-2} (7 columns with 2 samples each), two older players on y_t (2 columns).
    whole, part = 16 + 7 * 32, 16 + 2 * 32
    np.testing.assert_allclose(runs["score"], 10 * (1 + 2 * part / whole))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--topology=v5p-16"], "say which experiment"),
        (["--config=CONFIG"], "say which slice"),
        (["--config=CONFIG", "--topology=v5p-16", "--topolgy=x"], "unknown argument '--topolgy=x'"),
        (["--config=CONFIG", "--topology=v5p-16", "--slices=two"], "invalid int value"),
        (["--config=CONFIG", "--topology=v5p-16", "--efficiency=0"], "--efficiency=0.0 must be a number above 0"),
        (["--config=CONFIG", "--topology=v5p-16", "--programs=eat"], "not one of train"),
        (["--config=CONFIG", "--topology=v5p-16", "--config.train.batchsize=3"], "train.batch_size"),
    ],
)
def test_wrong_flags(flags: list[str], said: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(topologies, "check_compiler", lambda: None)
    config = f"{ROOT}/configs/tpaw.py"
    assert command.main([flag.replace("CONFIG", config) for flag in flags]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_without_the_compiler_one_sentence_says_how_to_get_it(capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main([f"--config={ROOT}/configs/tpaw.py", "--topology=v5p-16"]) == 1
    error = capsys.readouterr().err
    assert 'pip install "selfplay_jax[tpu]"' in error
    assert error.count("\n") == 1


# Stands in for the worker: dies like the TPU compiler while it compiles "score" (or while it writes "fill"'s text), and
# never ends with "decode".
STAND_IN = """#!{python}
import json, os, sys, time
request = json.load(sys.stdin)
def tell(program, stage, **fields):
    print(json.dumps(dict(program=program, stage=stage, **fields)), flush=True)
for name in request["programs"]:
    tell(name, "started")
    if name == "score":
        os.write(2, b"noise\\nCheck failed: something\\n")
        os._exit(134)
    if name == "decode":
        time.sleep(600)
    tell(name, "compiled", seconds=1.0, memory=dict(arguments=5.0))
    if name == "fill":
        os._exit(139)
    tell(name, "read", once=dict(cycles=3.0), repeated=dict())
"""


def test_a_compiler_that_dies_costs_one_program(tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    stand_in, python = tmp_path / "python", sys.executable
    stand_in.write_text(STAND_IN.format(python=python))
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    names = ["score", "fill", "train", "decode"]
    score, fill, train, decode = compile_programs(config_of(), PLAIN, V5E, names, limit=12)
    assert (score.status(V5E), score.message) == (CRASHED, "Check failed: something")
    assert (fill.status(V5E), fill.once) == (FITS, None)  # its size was known before
    assert (train.status(V5E), train.once) == (FITS, hlo.Traffic(cycles=3.0))
    assert decode.status(V5E) == LATE
    stand_in.write_text(f"#!{python}\nraise OSError('no room for libtpu')\n")
    with pytest.raises(UserError, match="its last words: OSError: no room for libtpu"):
        compile_programs(config_of(), PLAIN, V5E, names)


def preflight(*flags: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user would: no setting of this test process's reaches it."""
    env = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    config = "--config=configs/tpaw.py"
    small = ("--config.samples_per_prompt=1", "--config.opponents_per_prompt=1", "--config.train.batch_size=8")
    return subprocess.run(
        [sys.executable, "-m", "selfplay_jax.preflight", config, *small, *flags],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip


@needs_compiler
@pytest.mark.tpu_compile
def test_the_built_in_game_compiles_for_four_chips() -> None:
    done = preflight(
        "--topology=v5e:2x2", "--json", "--config.scoring.batch_size=8", "--config.sampling.slots=8",
        "--config.model.remat=full",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["model"] == "the built-in base"
    assert found["assumptions"]["prompts"] == 100
    (result,) = found["slices"]
    assert (result["chips"], result["hosts"], result["fits"]) == (4, 1, True)
    assert result["mesh"] == {"replica": 1, "fsdp": 4, "tensor": 1}
    assert [program["name"] for program in result["programs"]] == ["train", "score", "fill", "decode"]
    for program in result["programs"]:
        assert program["status"] == FITS
        assert 0 < program["total_gib"] < 1
        assert 0 < program["seconds"]["mfu_in_turn"] <= program["seconds"]["mfu_hidden"] < 1
        assert program["seconds"]["estimated"]
    train = result["programs"][0]
    assert train["model_flops"] < train["hardware_flops"]
    assert train["gib"]["optimizer"] > 1.9 * train["gib"]["parameters"]
    assert train["collectives"][0]["reduce-scatter"] > 0
    assert 0 < result["round"]["hours"] < 0.1
    assert {phase["program"] for phase in result["round"]["phases"]} == {"train", "score", "fill", "decode"}


@needs_compiler
@pytest.mark.tpu_compile
def test_what_does_not_fit_gets_advice_that_was_tried(tmp_path: pathlib.Path) -> None:
    fields = {  # a table of embeddings of 20 GiB, and little else
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 1 << 20, "hidden_size": 5120,
        "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4, "head_dim": 8,
        "max_position_embeddings": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    done = preflight("--topology=v5litepod-4", f"--model={tmp_path}", "--programs=decode", "--config.sampling.slots=4")
    assert done.returncode == command.DOES_NOT_FIT, done.stderr
    assert "DOES NOT FIT" in done.stdout
    assert "What would make it fit" in done.stdout
    assert "--config.sampling.slots=1  (too large" in done.stdout
    assert "--config.mesh.tensor=4  (fits" in done.stdout


@needs_compiler
@pytest.mark.tpu_compile
def test_two_slices_talk_through_the_data_centre() -> None:
    config = config_of("--config.mesh.replica=2", "--config.train.batch_size=8", "--config.samples_per_prompt=1",
                       "--config.opponents_per_prompt=1", "--config.model.compute_dtype=bfloat16")  # fmt: skip
    shape = dataclasses.replace(PLAIN, hidden_size=512, intermediate_size=1024, vocab_size=1024)
    (train,) = compile_programs(config, shape, topologies.find("2xv5e:2x2"), ["train"])
    assert train.status(V5E) == FITS
    assert train.mesh == {"replica": 2, "fsdp": 4, "tensor": 1}
    assert train.once is not None
    # Gradients cross once: each device's part is a quarter of the float32 parameters, and sends half of it twice.
    np.testing.assert_allclose(train.once.dcn_bytes, train.holds["parameters"], rtol=0.05)
    with pytest.raises(UserError, match=r"mesh\.replica=1 must be a multiple of the 2 slices"):
        compile_programs(config_of(), PLAIN, topologies.find("2xv5e:2x2"), ["train"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ""),
        ("Traceback:\n  File x\nOSError: no room\n", "OSError: no room"),
        (
            "I1122 00:00:00 1 a.cc:1] fine\nF1122 00:00:01 1 b.cc:2] Check failed: x == 8 (100 vs. 8)\n*** stack\n"
            "Raising signal 6 with default behavior",
            "F1122 00:00:01 1 b.cc:2] Check failed: x == 8 (100 vs. 8)",
        ),
    ],
)
def test_last_words(text: str, words: str) -> None:
    assert last_words(text) == words


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--config.data.examples=150", "--config.data.validation_examples=200"), 150),  # held back on top of them
        (("--config.data.source=builtin", "--config.data.examples=0"), 100),
        (
            (
                "--config.data.source=openai/gsm8k:main",
                "--config.data.examples=0",
                "--config.data.validation_examples=73",
            ),
            7400,
        ),
        (("--config.data.source=data/mine.jsonl", "--config.data.examples=0"), None),
    ],
)
def test_prompts_of_a_round(flags: tuple[str, ...], expected: int | None) -> None:
    config = config_of(*flags)
    assert speed.prompts(config, None) == expected
    assert speed.prompts(config, 7) == 7
