"""Sources and tokens: every way an example can come in, and which ids are kept of it."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest
from tokenizers import Tokenizer, models
from toy_tokenizers import CHATML, DIALOGUE, LLAMA2, assistant, llama3, qwen, user
from transformers import PreTrainedTokenizerFast

from selfplay_jax.data import sources, tokens
from selfplay_jax.data.sources import Example
from selfplay_jax.data.templates import Template, load_tokenizer
from selfplay_jax.errors import UserError


def written(path: pathlib.Path, *records: Any) -> pathlib.Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return path


def pair(n: int) -> dict[str, str]:
    return {"prompt": f"p{n}", "response": f"r{n}"}


# Sources


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "P", "response": "R"},
        {"prompt": "P", "completion": "R"},
        {"question": "P", "answer": "R"},
        {"prompt": [user("P")], "response": "R"},
        {"prompt": [user("P")], "completion": [assistant("R")]},
        {"messages": [user("P"), assistant("R")]},
        {"messages": [{"role": "system", "content": ""}, user("P"), assistant("R")]},
        {"prompt": "P", "messages": [user("P"), assistant("R")]},  # UltraChat
    ],
    ids=lambda record: "-".join(record),
)
def test_conventions(tmp_path: pathlib.Path, record: dict[str, Any]) -> None:
    examples, skipped = sources.load(written(tmp_path / "a.jsonl", record))
    assert skipped == []
    assert examples == [Example(0, (user("P"),), "R", None, "a.jsonl:1")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "P", "chosen": "R", "rejected": "W"},
        {"prompt": "P", "chosen": [user("P"), assistant("R")], "rejected": [user("P"), assistant("W")]},
        {"prompt": [user("P")], "chosen": [assistant("R")], "rejected": [assistant("W")], "messages": []},
    ],
)
def test_preference_data(tmp_path: pathlib.Path, record: dict[str, Any]) -> None:
    examples, _ = sources.load(written(tmp_path / "a.jsonl", record))
    assert examples == [Example(0, (user("P"),), "R", "W", "a.jsonl:1")]


def test_a_dialogues_last_assistant_turn_is_the_response(tmp_path: pathlib.Path) -> None:
    record = {"messages": [{"role": "system", "content": "S"}, *DIALOGUE, {**assistant("fine"), "extra": 1}]}
    (example,), _ = sources.load(written(tmp_path / "a.jsonl", record))
    assert example.messages == ({"role": "system", "content": "S"}, *DIALOGUE)
    assert example.response == "fine"


def test_columns_override(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / "a.jsonl", {"q": "P", "a": "R", "prompt": "no", "response": "no"})
    (example,), _ = sources.load(path, columns={"prompt": "q", "response": "a"})
    assert (example.messages, example.response) == ((user("P"),), "R")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "q", "response": "b"}, r"no column 'b' .*its columns are q, a"),
        ({"promt": "q", "response": "a"}, r"data.columns has 'promt'; its keys may be prompt"),
        ({"prompt": "q"}, r"data.columns must name"),
        (None, r"cannot tell prompt from response among the columns q, a; set data.columns"),
    ],
)
def test_wrong_columns(tmp_path: pathlib.Path, columns: dict[str, str] | None, said: str) -> None:
    path = written(tmp_path / "a.jsonl", {"q": "P", "a": "R"})
    with pytest.raises(UserError, match=said):
        sources.load(path, columns=columns)


BAD = [
    ('{"prompt": "p", "response": ', r"not valid JSON \(Expecting value at column 28\)"),
    ("[1]", "must be a JSON object, not list"),
    ({"prompt": "p"}, "the field 'response' is missing"),
    ({"prompt": "p", "response": None}, "the field 'response' is missing"),
    ({"prompt": " \n", "response": "r"}, "'prompt' is empty"),
    ({"prompt": "p", "response": "\t"}, "'response' is empty"),
    ({"prompt": "p", "response": 7}, "'response' must be text, not int"),
    ({"prompt": {"a": 1}, "response": "r"}, "'prompt' must be text, not dict"),
    ({"prompt": [], "response": "r"}, "'prompt' must be a non-empty list"),
    ({"prompt": [user("p"), assistant("q")], "response": "r"}, "prompt ends with an assistant turn"),
    ('{"prompt": "p", "response": "\\ud800"}', "half a surrogate pair"),
]


@pytest.mark.parametrize(("record", "said"), BAD)
def test_bad_records_are_named_or_skipped(tmp_path: pathlib.Path, record: Any, said: str) -> None:
    path = written(tmp_path / "a.jsonl", pair(0), "", record, pair(2))
    with pytest.raises(UserError, match=rf"a\.jsonl:3: .*{said}.*data.on_bad_record"):
        sources.load(path)
    examples, skipped = sources.load(path, on_bad_record="skip")
    assert len(skipped) == 1
    assert [(e.id, e.response, e.where) for e in examples] == [(0, "r0", "a.jsonl:1"), (2, "r2", "a.jsonl:4")]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([user("p")], "must end with an assistant turn, not with a user turn"),
        ([user("p"), assistant("r"), user("q")], "must end with an assistant turn"),
        ([assistant("r")], "there is no prompt"),
        ([{"from": "human", "value": "p"}], r"messages\[0\].role is None; roles are system, user"),
        ([user(" "), assistant("r")], r"messages\[0\].content' is empty"),
        ([user("p"), {"role": "assistant"}], r"messages\[1\].content' must be text, not missing"),
        ("p", "must be a non-empty list of messages"),
    ],
)
def test_bad_messages(tmp_path: pathlib.Path, messages: Any, said: str) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl:1: .*{said}"):
        sources.load(written(tmp_path / "a.jsonl", {"messages": messages}))


def test_odd_but_valid_jsonl(tmp_path: pathlib.Path) -> None:
    """A byte-order mark, Windows line ends, no newline at the end, and a line separator inside a string."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + json.dumps(pair(0)).encode() + b"\r\n"
        b"\r\n" + json.dumps({"prompt": "a\u2028b", "response": "é"}, ensure_ascii=False).encode()
    )
    examples, _ = sources.load(path)
    assert [(e.id, e.messages[0]["content"], e.response, e.where) for e in examples] == [
        (0, "p0", "r0", "a.jsonl:1"),
        (1, "a\u2028b", "é", "a.jsonl:3"),
    ]
    path.write_bytes(b'{"prompt": "p", "response": "\xff"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl:1: not valid UTF-8"):
        sources.load(path)


def test_json_files(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([pair(0), pair(1)], indent=1), "utf-8")
    assert [e.where for e in sources.load(path)[0]] == ["a.json[0]", "a.json[1]"]
    written(path, pair(0), pair(1))  # JSON lines under the name .json
    assert [e.where for e in sources.load(path)[0]] == ["a.json:1", "a.json:2"]
    path.write_text('[{"prompt": "p",\n', "utf-8")
    with pytest.raises(UserError, match=r"a\.json: not a valid JSON array: .*line 2"):
        sources.load(path)


def test_parquet(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    import pyarrow.parquet

    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    path = tmp_path / "a.parquet"
    rows = [{"messages": [user("P"), assistant("R")]}, {"messages": [user("P"), assistant("")]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(UserError, match=r"a\.parquet\[1\]: 'messages\[1\].content' is empty"):
        sources.load(path)
    examples, skipped = sources.load(path, on_bad_record="skip")
    assert examples == [Example(0, (user("P"),), "R", None, "a.parquet[0]")]
    assert len(skipped) == 1
    assert not list(home.iterdir())  # and no cache left behind
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        sources.load(path)


def test_directories_and_globs(tmp_path: pathlib.Path) -> None:
    (tmp_path / "data").mkdir()
    written(tmp_path / "data" / "train-00001.jsonl", pair(2))
    written(tmp_path / "data" / "train-00000.jsonl", pair(0), pair(1))
    written(tmp_path / "test.jsonl", pair(9))
    written(tmp_path / "README.md", "# not data")
    written(tmp_path / "dataset_infos.json", {"train": "not data either"})
    assert [(e.id, e.response) for e in sources.load(tmp_path)[0]] == [(0, "r0"), (1, "r1"), (2, "r2")]
    assert [e.response for e in sources.load(tmp_path, split="test")[0]] == ["r9"]
    assert [e.response for e in sources.load(f"{tmp_path}/**/*.jsonl")[0]] == ["r0", "r1", "r2", "r9"]
    with pytest.raises(UserError, match=r"no file for the split 'validation' among .*test\.jsonl"):
        sources.load(tmp_path, split="validation")


def test_limit_is_a_seeded_subset_with_the_sources_ids(tmp_path: pathlib.Path) -> None:
    path = written(tmp_path / "a.jsonl", *map(pair, range(50)))
    everything, _ = sources.load(path)
    some, _ = sources.load(path, limit=10, seed=3)
    ids = [e.id for e in some]
    assert len(set(ids)) == 10
    assert ids == sorted(ids)
    assert ids != list(range(10))
    assert some == [everything[i] for i in ids]
    assert some == sources.load(path, limit=10, seed=3)[0]
    assert ids != [e.id for e in sources.load(path, limit=10, seed=4)[0]]
    assert set(ids) < {e.id for e in sources.load(path, limit=20, seed=3)[0]}
    assert sources.load(path, limit=99)[0] == everything


def test_missing_and_empty_sources(tmp_path: pathlib.Path) -> None:
    written(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"tran\.jsonl does not exist; did you mean train\.jsonl\?"):
        sources.load(tmp_path / "tran.jsonl")
    with pytest.raises(UserError, match=r"the directory .*nowhere does not exist"):
        sources.load(tmp_path / "nowhere" / "train.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl holds no usable record: it is empty"):
        sources.load(tmp_path / "train.jsonl")
    written(tmp_path / "train.jsonl", "nonsense", "[]")
    with pytest.raises(UserError, match="all 2 records are bad and were skipped"):
        sources.load(tmp_path / "train.jsonl", on_bad_record="skip")
    with pytest.raises(UserError, match=r"notes\.txt: cannot read a \.txt file"):
        sources.load(written(tmp_path / "notes.txt", "x"))
    with pytest.raises(UserError, match=r"data\.on_bad_record is 'ignore'"):
        sources.load(tmp_path / "train.jsonl", on_bad_record="ignore")
    with pytest.raises(UserError, match=r"data\.limit is -1"):
        sources.load(tmp_path / "train.jsonl", limit=-1)


def test_a_hub_dataset_that_cannot_be_had_says_what_was_tried() -> None:
    with pytest.raises(UserError, match=r"load_dataset\('nobody/nothing', 'main', split='train'\) failed"):
        sources.load("nobody/nothing:main")  # tests/conftest.py forbids the network


def test_a_hub_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        assert (name, config, split) == ("some/data", None, "validation")
        return datasets.Dataset.from_list([pair(0), pair(1)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples, _ = sources.load("some/data", split="validation")
    assert [(e.response, e.where) for e in examples] == [("r0", "data[0]"), ("r1", "data[1]")]


def test_gsm8k(shared: pathlib.Path) -> None:
    examples, skipped = sources.load(shared / "data" / "gsm8k" / "train.jsonl")
    assert (len(examples), skipped) == (7473, [])
    assert examples[16].where == "train.jsonl:17"
    assert all("####" in e.response for e in examples)
    assert len(sources.load(shared / "data" / "gsm8k", split="test")[0]) == 1319


# Tokens


def encode(examples: list[Example], template: Template, prompt: int = 99, response: int = 99, **kwargs: str) -> Any:
    return tokens.encode(examples, template, max_prompt_tokens=prompt, max_response_tokens=response, **kwargs)


CHATML_IF = "{% endif %}{% endfor %}" + CHATML
EXAMPLES = [
    Example(3, (user("Hello"),), "two", None, "a:1"),
    Example(5, (user("Hello " * 30),), "two", None, "a:2"),
    Example(8, (user("Hello"),), "two " * 30, None, "a:3"),
]


def test_encode() -> None:
    template = Template.from_tokenizer(llama3())
    records, counts = encode([*EXAMPLES[:1], Example(9, tuple(DIALOGUE), "fine", "ill", "a:4")], template)
    assert counts == {
        "kept": 2,
        "prompts_dropped": 0,
        "prompts_truncated": 0,
        "responses_dropped": 0,
        "responses_truncated": 0,
    }
    assert [r.id for r in records] == [3, 9]
    assert records[0].rejected is None
    last = records[1]
    assert last.prompt == template.encode_prompt(DIALOGUE)
    assert last.prompt.count(template.end_id) == 3  # in the prompt too: only lengths may tell where the answer ends
    assert (last.target, last.rejected) == (template.encode_response("fine"), template.encode_response("ill"))
    assert (last.prompt_text, last.target_text) == (template.render_prompt(DIALOGUE), "fine")


def test_overlong_examples_are_dropped() -> None:
    template = Template.from_tokenizer(qwen())
    records, counts = encode(EXAMPLES, template, 40, 20)
    assert [r.id for r in records] == [3]
    assert (counts["kept"], counts["prompts_dropped"], counts["responses_dropped"]) == (1, 1, 1)
    whole, counts = encode([EXAMPLES[0]], template, len(records[0].prompt), len(records[0].target))
    assert counts["kept"] == 1  # the limit itself fits
    assert whole == records
    wrong = Example(1, (user("Hello"),), "two", "two " * 30, "a:1")
    assert encode([EXAMPLES[0], wrong], template, 40, 20)[1]["responses_dropped"] == 1


@pytest.mark.parametrize("tokenizer", [qwen, llama3], ids=["no-bos", "bos"])
def test_overlong_examples_are_cut(tokenizer: Any) -> None:
    template = Template.from_tokenizer(tokenizer())
    full, _ = encode(EXAMPLES, template, 9999, 9999)
    records, counts = encode(EXAMPLES, template, 40, 20, overlong="truncate")
    assert counts == {
        "kept": 3,
        "prompts_dropped": 0,
        "prompts_truncated": 1,
        "responses_dropped": 0,
        "responses_truncated": 1,
    }
    assert records[0] == full[0]
    head = [] if template.bos_id is None else [template.bos_id]
    assert records[1].prompt == head + full[1].prompt[len(head) - 40 :]
    assert len(records[1].prompt) == 40
    assert records[2].target == full[2].target[:20]  # and no invented end token
    assert records[2].target[-1] not in template.stop_ids
    assert template.decode(records[2].target) == ("two " * 30)[: len(template.decode(records[2].target))]
    one, _ = encode(EXAMPLES, template, 1, 20, overlong="truncate")
    assert [len(r.prompt) for r in one] == [1, 1, 1]


def test_encode_errors() -> None:
    template = Template.from_tokenizer(qwen())
    with pytest.raises(UserError, match=r"all 3 examples were dropped, 3 for prompts over data.max_prompt_tokens = 2"):
        encode(EXAMPLES, template, prompt=2)
    with pytest.raises(UserError, match=r"3 for answers over data.max_response_tokens = 1 \(the shortest has \d+\)"):
        encode(EXAMPLES, template, 999, 1)
    with pytest.raises(UserError, match=r"data\.overlong is 'cut'; it must be 'drop' or 'truncate'"):
        encode(EXAMPLES, template, overlong="cut")
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens is 0"):
        encode(EXAMPLES, template, prompt=0)
    refusing = Template.from_tokenizer(qwen(LLAMA2.replace("bos_token", "eos_token")))
    with pytest.raises(UserError, match=r"set\.jsonl:5: template 'chat' cannot write .*\(user, user\): roles must"):
        encode([Example(0, (user("a"), user("b")), "r", None, "set.jsonl:5")], refusing)
    with pytest.raises(UserError, match="no examples"):
        encode([], template)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("{{ raise_exception('no shouting') }}", "no shouting"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ m['name'] + 1 }}", "has no attribute 'name'"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
    ],
)
def test_a_template_that_fails_on_one_record_names_it(code: str, said: str) -> None:
    template = Template.from_tokenizer(qwen("{% for m in messages %}{% if 'XX' in m['content'] %}" + code + CHATML_IF))
    fine = Example(0, (user("b"),), "r", None, "set.jsonl:1")
    assert len(encode([fine], template)[0]) == 1
    with pytest.raises(UserError, match=rf"^set\.jsonl:2: template 'chat' cannot write .*\(user\): .*{said}") as caught:
        encode([fine, Example(1, (user("XXX"),), "r", None, "set.jsonl:2")], template)
    assert "\n" not in str(caught.value)


def test_a_prompt_of_no_tokens_is_an_error() -> None:
    core = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1}, merges=[]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")
    template = Template.from_tokenizer(tokenizer)
    with pytest.raises(UserError, match=r"a:1: the tokenizer turns the prompt into no token at all: 'zzz'"):
        encode([Example(0, (user("zzz"),), "a", None, "a:1")], template)


def test_gsm8k_with_real_tokenizers(shared: pathlib.Path) -> None:
    examples, _ = sources.load(shared / "data" / "gsm8k" / "train.jsonl", limit=64)
    template = Template.from_tokenizer(load_tokenizer(shared / "tokenizers" / "minimind"))
    records, counts = encode(examples, template, 320, 320)
    assert len(records) == counts["kept"] == 64 - counts["prompts_dropped"] - counts["responses_dropped"]
    assert counts["kept"] > 56
    assert all(template.decode(r.target) == r.target_text for r in records)


# Start-up


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = "('transformers', 'tokenizers', 'datasets', 'pandas', 'pyarrow', 'jax', 'tensorflow', 'torch')"
    code = (
        "import sys, selfplay_jax.data, selfplay_jax.data.tokens, selfplay_jax.data.templates as t\n"
        f"assert not [m for m in {heavy} if m in sys.modules], sorted(sys.modules)\n"
        "try:\n    t.load_tokenizer('.')\nexcept t.UserError:\n    pass\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")  # nor does transformers miss PyTorch aloud
