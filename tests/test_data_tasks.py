"""The lists of a run: subsets, turns, what data.json records, the cache, and bad records on disk."""

import hashlib
import json
import pathlib
import struct
import threading
from typing import Any

import pytest
from etils import epath
from toy_tokenizers import DIALOGUE, assistant, qwen, user

from selfplay_jax import config as configs
from selfplay_jax import game
from selfplay_jax.data import cache, sources, tasks, tokens
from selfplay_jax.data.sources import Example
from selfplay_jax.data.templates import Template
from selfplay_jax.errors import UserError

TEMPLATE = Template.from_tokenizer(qwen())


def written(path: pathlib.Path, *records: Any) -> pathlib.Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return path


def dialogue(n: int, answers: int) -> dict[str, Any]:
    turns = [turn for k in range(answers) for turn in (user(f"q{n}.{k}"), assistant(f"a{n}.{k}"))]
    return {"messages": turns}


def data_config(source: pathlib.Path, **changes: Any) -> Any:
    data = configs.base().data
    data.update({"source": str(source), "validation_examples": 4, "test_examples": 3, "cache": "", **changes})
    return data


# Turns


def test_first_turn(tmp_path: pathlib.Path) -> None:
    system = {"role": "system", "content": "S"}
    path = written(
        tmp_path / "a.jsonl",
        {"messages": [system, *DIALOGUE]},  # may end with a user's turn: what follows the first answer is cut
        {"prompt": DIALOGUE, "response": "fine"},
    )
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*must end with an assistant turn, not with a user turn"):
        sources.load(path, columns={"messages": "messages"})
    examples, bad = sources.load(path, columns={"messages": "messages"}, turns="first", on_bad_record="skip")
    assert examples == [Example(0, (system, user("Hello")), "two worlds", None, "a.jsonl:1")]
    assert [b.problem for b in bad] == ["the field 'messages' is missing"]
    plain, _ = sources.load(
        path, columns={"prompt": "prompt", "response": "response"}, turns="first", on_bad_record="skip"
    )
    assert plain == [Example(1, (user("Hello"),), "two worlds", None, "a.jsonl:2")]


def test_every_turn_is_an_example_after_all_before_it(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / "a.jsonl", dialogue(0, 1), "nonsense", dialogue(2, 3))
    examples, bad = sources.load(path, turns="all", on_bad_record="skip")
    assert [(e.id, len(e.messages), e.response) for e in examples] == [
        (0, 1, "a0.0"),
        (2 * 256, 1, "a2.0"),
        (2 * 256 + 1, 3, "a2.1"),
        (2 * 256 + 2, 5, "a2.2"),
    ]
    assert examples[2].messages == (user("q2.0"), assistant("a2.0"), user("q2.1"))
    assert examples[3].where == "a.jsonl:3 (assistant turn 3)"
    assert len(bad) == 1
    assert [e.id for e in sources.load(written(path, dialogue(0, 256)), turns="all")[0]] == list(range(256))


@pytest.mark.parametrize(
    ("turns", "record", "said"),
    [
        ("all", dialogue(0, 257), "has 257 assistant turns; data.turns=all takes 256 at most"),
        ("all", {"messages": [user("q")]}, "'messages' has no assistant turn"),
        ("first", {"messages": [user("q")]}, "'messages' has no assistant turn"),
        ("first", {"messages": [assistant("a"), user("q"), assistant("b")]}, "no prompt before the answer"),
        ("all", {"messages": [user("q"), assistant("a"), assistant("b")]}, "prompt ends with an assistant turn"),
    ],
)
def test_turns_that_make_no_example(tmp_path: pathlib.Path, turns: str, record: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{said}"):
        sources.load(written(tmp_path / "a.jsonl", record), turns=turns)


def test_an_unknown_choice_of_turns(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match=r"data\.turns is 'each'; it must be one of last, first, all"):
        sources.load(written(tmp_path / "a.jsonl", dialogue(0, 1)), turns="each")


def test_ids_that_would_not_fit_are_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.jsonl", *(dialogue(n, 1) for n in range(3)))
    monkeypatch.setattr(sources, "_LARGEST_ID", 2 * 256 - 1)
    assert len(sources.load(path)[0]) == 3
    with pytest.raises(UserError, match=r"more than 2 records; data\.turns=all cannot number them"):
        sources.load(path, turns="all")


def test_the_turns_of_a_dialogue_stay_in_one_split(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / "a.jsonl", *(dialogue(n, 1 + n % 3) for n in range(30)))
    task = tasks.load(data_config(path, turns="all", examples=10), TEMPLATE, 0)
    records = [{record.id // 256 for record in getattr(task, split)} for split in tasks.SPLITS]
    assert [len(found) for found in records] == [10, 4, 3]  # the numbers of the config are of dialogues
    assert not records[0] & records[1] and not records[0] & records[2] and not records[1] & records[2]
    ids = [record.id for split in tasks.SPLITS for record in getattr(task, split)]
    assert len(set(ids)) == len(ids) == sum(1 + n % 3 for found in records for n in found)
    # The same dialogues as with their last turns alone.
    last = tasks.load(data_config(path, examples=10), TEMPLATE, 0)
    assert {record.id for record in last.train} == records[0]


# Prompts alone


def test_prompts_alone(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / "a.jsonl", {"prompt": "p0"}, {"prompt": ""}, {"prompt": [user("p2"), assistant("r2")]})
    prompts, bad = sources.load_prompts(path, on_bad_record="skip")
    assert [(p.id, p.messages, p.where) for p in prompts] == [
        (0, (user("p0"),), "a.jsonl:1"),
        (2, (user("p2"),), "a.jsonl:3"),
    ]
    assert [b.problem for b in bad] == ["'prompt' is empty"]
    with pytest.raises(UserError, match=r"a\.jsonl:2: 'prompt' is empty"):
        sources.load_prompts(path)
    with pytest.raises(UserError, match=r"has no column 'ask' .*its columns are prompt"):
        sources.load_prompts(path, columns={"prompt": "ask"})
    with pytest.raises(UserError, match=r"cannot tell prompt from response among the columns x"):
        sources.load_prompts(written(path, {"x": "p"}))
    with pytest.raises(UserError, match=r'data.columns must name "prompt" or "messages"'):
        sources.load_prompts(path, columns={"response": "x"})


def test_ifeval_prompts(shared: pathlib.Path) -> None:
    path = shared / "data" / "ifeval" / "input_data.jsonl"
    prompts, bad = sources.load_prompts(path)
    assert (len(prompts), bad) == (541, [])
    assert [prompt.id for prompt in prompts] == list(range(541))
    assert prompts[0].messages[0]["content"].startswith("Write a 300+ word summary of the wikipedia page")
    some, _ = sources.load_prompts(path, limit=20, seed=1)
    assert len(some) == 20 and set(some_ids := [p.id for p in some]) < set(range(541)) and some_ids == sorted(some_ids)
    with pytest.raises(UserError, match="cannot tell prompt from response"):
        sources.load(path)  # where a target is needed, prompts alone will not do


# Identity


def test_data_json_says_what_the_data_are(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": f"p{n}", "chosen": f"r{n}", "rejected": f"w{n}"} for n in range(20)]
    task = tasks.load(data_config(written(tmp_path / "a.jsonl", *rows)), TEMPLATE, 0)
    about = json.loads(json.dumps(task.describe()))
    assert about["bad_records_skipped"] == 0
    assert about["template"] == "chat"
    assert len(about["tokenizer_sha256"]) == len(about["template_sha256"]) == 64
    assert {name: about[name]["examples"] for name in tasks.SPLITS} == {"train": 13, "validation": 4, "test": 3}
    assert about["train"]["kept"] == 13 and about["train"]["prompts_dropped"] == 0
    assert (about["test"]["source"], about["test"]["split"]) == (str(tmp_path / "a.jsonl"), "train")
    for name in tasks.SPLITS:
        expected = hashlib.sha256()
        for record in getattr(task, name):
            numbers = [record.id, len(record.prompt), len(record.target), len(record.rejected)]
            numbers += record.prompt + record.target + record.rejected
            expected.update(struct.pack(f"<{len(numbers)}q", *numbers))
        assert about[name]["sha256"] == expected.hexdigest()


def test_a_subset_is_the_seeds(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / "a.jsonl", *({"prompt": f"p{n}", "response": "r"} for n in range(40)))

    def train(seed: int) -> dict[str, Any]:
        return tasks.load(data_config(path, examples=8), TEMPLATE, seed).identity["train"]

    assert train(0) == train(0)
    assert train(0)["sha256"] != train(1)["sha256"]


def run_config(source: pathlib.Path, **changes: Any) -> Any:
    config = configs.base()
    config.data = data_config(source, **changes)
    return config


def test_a_run_refuses_data_that_changed(tmp_path: pathlib.Path) -> None:
    rows = [{"prompt": f"p{n}", "response": f"r{n}"} for n in range(20)]
    path, workdir = written(tmp_path / "a.jsonl", *rows), epath.Path(tmp_path / "run")
    workdir.mkdir()
    task = game._load_task(run_config(path), workdir, TEMPLATE)
    recorded = (workdir / "data.json").read_text()
    assert game._load_task(run_config(path), workdir, TEMPLATE) == task
    assert (workdir / "data.json").read_text() == recorded
    held = next(n for n in range(20) if n in {record.id for record in task.test})
    written(path, *rows[:held], {**rows[held], "response": "other"}, *rows[held + 1 :])
    with pytest.raises(UserError, match=r"data changed under the run in .*data\.json tells: the test examples\. Bring"):
        game._load_task(run_config(path), workdir, TEMPLATE)
    assert (workdir / "data.json").read_text() == recorded  # a refused run changes nothing
    written(path, *rows)
    other = qwen()
    other.add_tokens(["<extra>"])
    with pytest.raises(UserError, match=r"the data changed .*: the tokenizer\."):
        game._load_task(run_config(path), workdir, Template.from_tokenizer(other))
    with pytest.raises(UserError, match=r": the train examples, .*, the template\."):
        game._load_task(run_config(path), workdir, Template.from_tokenizer(qwen(), "plain"))
    (workdir / "data.json").write_text('{"bad_records_skipped": 0, "train": {"kept": 13}}')  # of an older version
    assert game._load_task(run_config(path), workdir, TEMPLATE) == task
    assert (workdir / "data.json").read_text() == recorded


# Bad records


def test_five_percent_bad_records(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    rows: list[Any] = [{"prompt": f"p{n}", "response": f"r{n}"} for n in range(200)]
    broken = {7: '{"prompt": "p', 50: {"prompt": "p"}, 51: {"prompt": " ", "response": "r"}, 199: [1]}
    broken |= {n: {"prompt": "p", "response": 3} for n in range(100, 106)}
    for n, row in broken.items():
        rows[n] = row
    path, workdir = written(tmp_path / "a.jsonl", *rows), epath.Path(tmp_path / "run")
    workdir.mkdir()
    with pytest.raises(UserError, match=rf"{path}:8: not valid JSON .* or set data.on_bad_record to 'skip'"):
        game._load_task(run_config(path), workdir, TEMPLATE)
    assert not list(workdir.iterdir())
    task = game._load_task(run_config(path, on_bad_record="skip"), workdir, TEMPLATE)
    listed = [json.loads(line) for line in (workdir / "bad_records.jsonl").read_text().splitlines()]
    assert [row["where"] for row in listed] == [f"{path}:{n + 1}" for n in sorted(broken)]
    assert [row["problem"] for row in listed[:3]] == [
        "not valid JSON (Unterminated string starting at at column 12)",
        "the field 'response' is missing",
        "'prompt' is empty",
    ]
    assert json.loads((workdir / "data.json").read_text())["bad_records_skipped"] == 10
    assert capsys.readouterr().out == f"10 bad records skipped, listed in {workdir}/bad_records.jsonl\n"
    assert len(task.train) == 200 - 10 - 4 - 3


def test_bytes_that_are_not_utf8(tmp_path: pathlib.Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = pa.array([b"good", b"b\xffd", b"fine"], pa.binary())
    table = pa.table({"prompt": pa.Array.from_buffers(pa.string(), 3, texts.buffers()), "response": ["r"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet\[1\]: not valid UTF-8 \(invalid start byte at byte 2 of a text\)"):
        sources.load(tmp_path / "a.parquet")
    assert [e.id for e in sources.load(tmp_path / "a.parquet", on_bad_record="skip")[0]] == [0, 2]
    (tmp_path / "a.json").write_bytes(b'[{"prompt": "p", "response": "\xff"}]')
    with pytest.raises(UserError, match=r"a\.json: not valid UTF-8 \(invalid start byte at byte 31\)"):
        sources.load(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_empty_files(tmp_path: pathlib.Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"it is empty|not a readable Parquet file"):
        sources.load(tmp_path / name)


def test_two_examples_of_one_id() -> None:
    examples = [Example(4, (user("p"),), "r", None, where) for where in ("a:1", "b:7")]
    with pytest.raises(UserError, match=r"b:7 and a:1 both have the id 4; .* ids must differ"):
        tokens.encode(examples, TEMPLATE, max_prompt_tokens=99, max_response_tokens=99)


def test_ids_of_the_source_do_not_matter(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / "a.jsonl", *({"id": 1, "prompt": f"p{n}", "response": "r"} for n in range(3)))
    assert [e.id for e in sources.load(path)[0]] == [0, 1, 2]


# The cache

LIMITS = {"max_prompt_tokens": 60, "max_response_tokens": 40, "overlong": "drop"}
EXAMPLES = [
    Example(3, (user("Hello"),), "two", None, "a:1"),
    Example(5, (user("Hello " * 60),), "two", None, "a:2"),
    Example(2**32 - 1, tuple(DIALOGUE), "é 你好", "ill", "a:4"),
]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often examples were tokenised."""
    calls: list[int] = []
    real = tokens.encode

    def encode(examples: list[Example], *args: Any, **kwargs: Any) -> Any:
        calls.append(len(examples))
        return real(examples, *args, **kwargs)

    monkeypatch.setattr(tokens, "encode", encode)
    return calls


def test_the_second_run_reads_the_cache(tmp_path: pathlib.Path, counted: list[int]) -> None:
    folder = tmp_path / "deep" / "cache"
    first = cache.encode(EXAMPLES, TEMPLATE, str(folder), **LIMITS)
    assert first == tokens.encode(EXAMPLES, TEMPLATE, **LIMITS)
    counted.clear()
    done: list[int] = []
    assert cache.encode(EXAMPLES, TEMPLATE, str(folder), on_progress=done.append, **LIMITS) == first
    assert (counted, done) == ([], [3])
    assert first[1]["prompts_dropped"] == 1
    assert len(list(folder.iterdir())) == 1
    # Anything that the result follows from makes another file.
    changed = [EXAMPLES[0], *EXAMPLES[2:]]
    for examples, template, limits in (
        (changed, TEMPLATE, LIMITS),
        ([EXAMPLES[0], Example(9, *list(vars(EXAMPLES[1]).values())[1:])], TEMPLATE, LIMITS),
        (EXAMPLES, Template.from_tokenizer(qwen(), "alpaca"), LIMITS),
        (EXAMPLES, TEMPLATE, {**LIMITS, "max_prompt_tokens": 61}),
        (EXAMPLES, TEMPLATE, {**LIMITS, "overlong": "truncate"}),
    ):
        counted.clear()
        result = cache.encode(examples, template, str(folder), **limits)
        assert counted == [len(examples)]
        assert result == tokens.encode(examples, template, **limits)
    assert len(list(folder.iterdir())) == 6


def test_no_cache(tmp_path: pathlib.Path, counted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        cache.encode(EXAMPLES, TEMPLATE, "", **LIMITS)
    tasks.load(configs.base().data, TEMPLATE, 0)  # nor is the built-in task kept
    assert counted[:2] == [3, 3]
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    cache.encode(EXAMPLES, TEMPLATE, "~", **LIMITS)
    assert len(list(tmp_path.glob("*.parquet"))) == 1


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_cache_file_is_made_anew(
    tmp_path: pathlib.Path, counted: list[int], damage: str, capsys: pytest.CaptureFixture
) -> None:
    first = cache.encode(EXAMPLES, TEMPLATE, str(tmp_path), **LIMITS)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    middle = whole.index(b"PAR1") + 40  # inside the first page
    damaged = {
        "cut": whole[:-50],
        "flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "empty": b"",
        "other": b"not parquet",
    }
    path.write_bytes(damaged[damage])
    assert cache.encode(EXAMPLES, TEMPLATE, str(tmp_path), **LIMITS) == first
    assert "cannot be read" in capsys.readouterr().out
    counted.clear()
    assert cache.encode(EXAMPLES, TEMPLATE, str(tmp_path), **LIMITS) == first
    assert counted == []


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("in the way")
    records, _ = cache.encode(EXAMPLES, TEMPLATE, str(tmp_path / "file"), **LIMITS)
    assert len(records) == 2
    assert "tokenised data cannot be kept in" in capsys.readouterr().out


def test_writers_at_the_same_time(tmp_path: pathlib.Path) -> None:
    results: list[Any] = []

    def write() -> None:
        results.append(cache.encode(EXAMPLES, TEMPLATE, str(tmp_path), **LIMITS))

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [results[0]] * 8
    assert [path.suffix for path in tmp_path.iterdir()] == [".parquet"]
    assert cache.encode(EXAMPLES, TEMPLATE, str(tmp_path), **LIMITS) == results[0]


def test_a_run_may_go_on_with_another_cache() -> None:
    config = configs.base()
    before = json.loads(config.to_json())
    config.data.cache = "/elsewhere"
    assert configs.difference(before, config) is None
    config.data.turns = "all"
    assert configs.difference(before, config) == "config.data.turns is 'last' there and 'all' here"
    config.data.turns = "lst"
    with pytest.raises(
        UserError, match=r"config\.data\.turns='lst' is not one of last, first, all \(did you mean last"
    ):
        configs.check(config)
