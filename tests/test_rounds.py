"""A round's files: responses come back as they went, and nothing half-written bears a final name."""

import dataclasses
import errno
import importlib
import pathlib
import types

import ml_collections
import numpy as np
import pyarrow.parquet as pq
import pytest

from selfplay_jax import rounds
from selfplay_jax.errors import Stopped, UserError
from selfplay_jax.groups import TARGET
from selfplay_jax.rounds import Responses, RoundFiles, chunks, gaps, read_array, source_name, write_array, write_bytes
from selfplay_jax.sampling.generate import Samples
from selfplay_jax.sampling.rollout import cut

rollouts = importlib.import_module("selfplay_jax.sampling.rollout")


@dataclasses.dataclass
class Record:
    """What save_responses needs of a record."""

    id: int
    prompt_text: str


RECORDS = [Record(7, "Wie weit?\n\u2028"), Record(3, "¿Cuánto? 🎲"), Record(12, "")]
TOKENS = [[[5, 1], []], [[9], [2, 2, 2, 1]], [[0, 151_935], [1]]]
TEXTS = ["weit 🎲", "", "\x00\x1f", "日本語\r\n", "a\ud7ff", '"quoted", and, commas']
IDS = [7, 3, 12]


def some_responses() -> Responses:
    finished = np.array([[True, False], [False, True], [False, True]])
    return Responses(TOKENS, finished, np.array([[-1.5, 0.0], [-0.25, -3e4], [-1e-7, -2.0]], np.float32))


def part(responses: Responses, rows: slice) -> Responses:
    return Responses(responses.tokens[rows], responses.finished[rows], responses.logps[rows])


def assert_same(found: Responses, wanted: Responses) -> None:
    assert found.tokens == wanted.tokens
    assert found.finished.dtype == bool and found.logps.dtype == np.float32
    np.testing.assert_array_equal(found.finished, wanted.finished)
    np.testing.assert_array_equal(found.logps, wanted.logps)


def test_responses_round_trip(tmp_path):
    files = RoundFiles(tmp_path, 4)
    files.save_responses(some_responses(), RECORDS, TEXTS)
    assert_same(files.load_responses(IDS), some_responses())
    table = pq.read_table(tmp_path / "rounds" / "004" / "responses.parquet")
    assert table["response"].to_pylist() == TEXTS
    assert table["prompt"].to_pylist() == [record.prompt_text for record in RECORDS for _ in range(2)]
    assert table["id"].to_pylist() == [7, 7, 3, 3, 12, 12] and table["sample"].to_pylist() == [0, 1] * 3
    assert [path.name for path in (tmp_path / "rounds" / "004").iterdir()] == ["responses.parquet"]


def test_lengths_and_join():
    whole = some_responses()
    assert whole.lengths.tolist() == [[2, 0], [1, 4], [2, 1]] and whole.lengths.dtype == np.int32
    assert_same(Responses.join([part(whole, slice(0, 1)), part(whole, slice(1, 3))]), whole)


def test_parts_join_into_one_file(tmp_path):
    files, whole = RoundFiles(tmp_path, 0), some_responses()
    assert files.parts() == []
    for rows in (slice(1, 3), slice(0, 1)):
        text = TEXTS[2 * rows.start : 2 * rows.stop]
        files.save_responses(part(whole, rows), RECORDS[rows], text, part=rows)
    assert_same(files.load_responses(IDS[1:], part=slice(1, 3)), part(whole, slice(1, 3)))
    assert not files.responses_path().exists()
    assert files.parts() == [slice(0, 1), slice(1, 3)]
    files.join_parts(files.parts())
    assert_same(files.load_responses(IDS), whole)
    assert not (files.directory / "responses").exists()


@pytest.mark.parametrize("ids", [[7, 3], [3, 7, 12], [7, 3, 13], [7, 3, 12, 1], [7, 7, 3, 3], []])
def test_responses_to_other_prompts_are_refused(tmp_path, ids):
    files = RoundFiles(tmp_path, 1)
    files.save_responses(some_responses(), RECORDS, TEXTS)
    with pytest.raises(UserError, match=r"responses\.parquet answers other prompts than the data has now: .*--workdir"):
        files.load_responses(ids)


def test_the_directories_of_rounds_and_of_the_warm_up(tmp_path):
    assert RoundFiles(tmp_path, -1).directory == tmp_path / "sft"
    assert RoundFiles(tmp_path, 12).directory == tmp_path / "rounds" / "012"
    assert RoundFiles(tmp_path, 2).score_path(1) == tmp_path / "rounds" / "002" / "scores" / "player_001.npz"
    assert source_name(TARGET) == "target" and source_name(3) == "round_003"


def test_the_summary_is_the_done_marker(tmp_path):
    files = RoundFiles(tmp_path, 0)
    assert files.summary() is None and files.read("evaluation.json") is None
    files.write("evaluation.json", {"theta": 1, "logp": float("-inf")})
    assert files.summary() is None
    files.write("summary.json", {"round": 0, "text": "θ"})
    assert files.summary() == {"round": 0, "text": "θ"}
    assert files.read("evaluation.json") == {"theta": 1, "logp": float("-inf")}


def test_arrays_round_trip(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_array(rounds.epath.Path(tmp_path) / "deep" / "a.npy", array)
    found = read_array(rounds.epath.Path(tmp_path) / "deep" / "a.npy")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_write_that_fails_leaves_the_old_file_or_none(tmp_path, monkeypatch, old, step):
    path = rounds.epath.Path(tmp_path) / "file.bin"
    if old is not None:
        path.write_bytes(old)

    def half(self, data):
        with open(self, "wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def fail(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), step, half if step == "write_bytes" else fail)
        with pytest.raises(UserError, match=r"cannot write .*file\.bin: No space left on device; .*whole"):
            write_bytes(path, b"new and long")
    assert [p.name for p in tmp_path.iterdir()] == ([] if old is None else ["file.bin"])
    assert old is None or path.read_bytes() == old
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"


def test_responses_that_cannot_be_written_are_not_there(tmp_path, monkeypatch):
    files = RoundFiles(tmp_path, 0)
    with monkeypatch.context() as patch:

        def fail(self, target):
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

        patch.setattr(type(files.directory), "replace", fail)
        with pytest.raises(UserError, match="quota"):
            files.save_responses(some_responses(), RECORDS, TEXTS)
    assert not files.responses_path().exists()
    assert list(pathlib.Path(files.directory).iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        write_bytes(rounds.epath.Path(tmp_path) / "file" / "x.bin", b"x")


@pytest.mark.parametrize(
    ("count", "size", "expected"),
    [
        (5, 2, [(0, slice(0, 2)), (1, slice(2, 4)), (2, slice(4, 5))]),
        (4, 2, [(0, slice(0, 2)), (1, slice(2, 4))]),
        (2, 9, [(0, slice(0, 2))]),
        (0, 3, []),
    ],
)
def test_chunks(count, size, expected):
    assert list(chunks(count, size)) == expected


@pytest.mark.parametrize(
    ("count", "there", "expected"),
    [
        (5, [], [slice(0, 5)]),
        (9, [slice(0, 2), slice(2, 3), slice(5, 8)], [slice(3, 5), slice(8, 9)]),
        (3, [slice(0, 3)], []),
    ],
)
def test_gaps(count, there, expected):
    assert gaps(count, there) == expected


@pytest.mark.parametrize(
    ("rows", "most", "processes", "sizes"),
    [
        ([slice(0, 1200)], 512, 1, [400, 400, 400]),
        ([slice(0, 7273)], 512, 64, [114] * 63 + [91]),  # GSM8K on v5litepod-256: no host waits
        ([slice(0, 7273)], 512, 8, [455] * 15 + [448]),
        ([slice(3, 5), slice(8, 11)], 512, 4, [2, 2, 1]),
        ([slice(0, 3)], 512, 8, [1, 1, 1]),
        ([], 512, 8, []),
    ],
)
def test_parts_are_shared_evenly(rows, most, processes, sizes):
    parts = cut(rows, most, processes)
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(part.start, part.stop)] == [
        i for part in rows for i in range(part.start, part.stop)
    ]


def test_a_stopped_rollout_goes_on_in_other_parts(tmp_path, monkeypatch):
    records = [types.SimpleNamespace(id=7 * i, prompt=[i] * 3, prompt_text=str(i)) for i in range(10)]
    template = types.SimpleNamespace(stop_ids=(1,), decode=str)
    sampled = []

    def generate(model, params, prompts, *, prompt_ids, samples_per_prompt, on_progress, **settings):
        sampled.extend(prompt_ids)
        on_progress(len(prompts) * samples_per_prompt)
        tokens = [[number, sample] for number in prompt_ids for sample in range(samples_per_prompt)]
        count = len(tokens)
        return Samples(tokens, np.full(count, 2), np.ones(count, bool), np.zeros(count, np.float32))

    monkeypatch.setattr(rollouts, "generate", generate)
    files = RoundFiles(tmp_path, 0)

    def play(chunk, check_stop=lambda: None):
        settings = ml_collections.ConfigDict(
            {"chunk": chunk, "slots": 4, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 2}
        )
        return rollouts.rollout(
            None, None, records, files, template, settings,
            samples_per_prompt=2, seed=0, mesh=None, check_stop=check_stop,
        )  # fmt: skip

    def stop():
        if len(sampled) == 9:
            raise Stopped

    with pytest.raises(Stopped):
        play(3, stop)
    assert files.parts() == [slice(0, 3), slice(3, 6)]
    responses = play(2)
    assert sampled == [7 * i for i in [*range(9), *range(6, 10)]]
    assert responses.tokens == [[[record.id, 0], [record.id, 1]] for record in records]
    assert play(5).tokens == responses.tokens and len(sampled) == 13
