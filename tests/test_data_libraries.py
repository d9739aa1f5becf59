"""Datasets in the shapes that the hub, `datasets` and tensorflow-datasets give them, as small local copies."""

import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from toy_tokenizers import assistant, user

from selfplay_jax.data import sources
from selfplay_jax.data.sources import Example
from selfplay_jax.errors import UserError

TEXT = datasets.Value("string")
MESSAGES = [{"content": TEXT, "role": TEXT}]
ULTRACHAT = datasets.Features({"prompt": TEXT, "prompt_id": TEXT, "messages": MESSAGES})
ULTRAFEEDBACK = datasets.Features(
    {
        "prompt": TEXT,
        "prompt_id": TEXT,
        "chosen": MESSAGES,
        "rejected": MESSAGES,
        "messages": MESSAGES,
        "score_chosen": datasets.Value("float64"),
        "score_rejected": datasets.Value("float64"),
    }
)
GSM8K = datasets.Features({"question": TEXT, "answer": TEXT})


def chat(n: int) -> dict[str, Any]:
    turns = [user(f"q{n}"), assistant(f"a{n}"), user(f"then {n}?"), assistant(f"b{n}")]
    return {"prompt": f"q{n}", "prompt_id": f"{n:064x}", "messages": turns}


def parquet(path: pathlib.Path, rows: list[dict[str, Any]], features: datasets.Features) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


@pytest.fixture
def ultrachat(tmp_path: pathlib.Path) -> pathlib.Path:
    """Laid out and described as HuggingFaceH4/ultrachat_200k is."""
    root = tmp_path / "ultrachat_200k"
    for split, shards in {"train_sft": 2, "test_sft": 1, "train_gen": 1, "test_gen": 1}.items():
        for shard in range(shards):
            rows = [chat(10 * shard + n) for n in range(3)]
            rows = [{**row, "prompt_id": f"{split}"} for row in rows]
            name = f"{split}-{shard:05d}-of-{shards:05d}-a3ecc755682a5e67.parquet"
            parquet(root / "data" / name, rows, ULTRACHAT)
    listed = "".join(
        f"  - split: {split}\n    path: data/{split}-*\n"
        for split in ("train_sft", "test_sft", "train_gen", "test_gen")
    )
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{listed}---\n# UltraChat\n")
    return root


def test_ultrachat(ultrachat: pathlib.Path) -> None:
    examples, bad = sources.load(ultrachat, split="train_sft")
    assert bad == []
    assert [e.id for e in examples] == [0, 1, 2, 3, 4, 5]
    assert [e.response for e in examples] == ["b0", "b1", "b2", "b10", "b11", "b12"]
    assert examples[3].messages == (user("q10"), assistant("a10"), user("then 10?"))
    assert examples[3].where == "train_sft-00001-of-00002-a3ecc755682a5e67.parquet[0]"
    assert len(sources.load(ultrachat, split="test_sft")[0]) == 3
    first, _ = sources.load(ultrachat, split="test_sft", turns="first")
    assert [(e.id, e.messages, e.response) for e in first] == [(n, (user(f"q{n}"),), f"a{n}") for n in range(3)]
    prompts, _ = sources.load_prompts(ultrachat, split="test_sft")
    assert prompts[1].messages == (user("q1"), assistant("a1"), user("then 1?"))


def test_a_split_that_is_not_there_lists_those_that_are(ultrachat: pathlib.Path) -> None:
    for split in ("train", "validation"):  # "train" is no part of "train_sft"
        with pytest.raises(UserError, match=f"no split '{split}'; its splits are test_gen, test_sft, train_gen, train"):
            sources.load(ultrachat, split=split)


def test_a_hub_dataset(ultrachat: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` itself reads the repository, only from a directory."""
    real = datasets.load_dataset

    def load_dataset(name: str, config: str | None, *, split: str) -> datasets.Dataset:
        assert name == "HuggingFaceH4/ultrachat_200k"
        return real(str(ultrachat), config, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    examples, _ = sources.load("HuggingFaceH4/ultrachat_200k", split="train_sft")
    local, _ = sources.load(ultrachat, split="train_sft")
    assert [(e.id, e.messages, e.response) for e in examples] == [(e.id, e.messages, e.response) for e in local]
    assert examples[4].where == "ultrachat_200k[4]"
    with pytest.raises(UserError, match=r"no split 'train'; its splits are train_sft, test_sft, train_gen, test_gen:"):
        sources.load("HuggingFaceH4/ultrachat_200k", split="train")
    with pytest.raises(UserError, match=r"load_dataset\('HuggingFaceH4/ultrachat_200k', 'main', .*'main' not found"):
        sources.load("HuggingFaceH4/ultrachat_200k:main", split="train_sft")


def test_gsm8k_repository_with_its_two_configs(tmp_path: pathlib.Path) -> None:
    root = tmp_path / "gsm8k"
    for config, answer in (("main", "plain"), ("socratic", "questions")):
        for split in ("train", "test"):
            rows = [{"question": f"q {split}", "answer": f"{answer} #### 1"}]
            parquet(root / config / f"{split}-00000-of-00001.parquet", rows, GSM8K)
    (example,), _ = sources.load(f"{root}:main", split="test")
    assert (example.messages, example.response) == ((user("q test"),), "plain #### 1")
    assert sources.load(f"{root}:socratic")[0][0].response == "questions #### 1"
    with pytest.raises(UserError, match=r"several configs, main, socratic; name one: .*gsm8k:main"):
        sources.load(root)
    with pytest.raises(UserError, match=r"gsm8k:nothing does not exist"):
        sources.load(f"{root}:nothing")


def test_the_hubs_own_parquet_conversion_names_splits_by_folder(tmp_path: pathlib.Path) -> None:
    for split in ("train", "test"):
        parquet(tmp_path / "main" / split / "0000.parquet", [{"question": split, "answer": "a"}], GSM8K)
    assert [e.messages[0]["content"] for e in sources.load(f"{tmp_path}:main", split="test")[0]] == ["test"]


def test_ultrafeedback(tmp_path: pathlib.Path) -> None:
    def dialogue(answer: str, earlier: str = "a") -> list[dict[str, str]]:
        return [user("q"), assistant(earlier), user("and?"), assistant(answer)]

    row = {
        "prompt": "q",
        "prompt_id": "0",
        "chosen": dialogue("good"),
        "rejected": dialogue("bad", earlier="another a"),
        "messages": dialogue("good"),
        "score_chosen": 8.5,
        "score_rejected": 4.0,
    }
    parquet(tmp_path / "data" / "train_prefs-00000-of-00001.parquet", [row], ULTRAFEEDBACK)
    parquet(tmp_path / "data" / "test_prefs-00000-of-00001.parquet", [row], ULTRAFEEDBACK)
    (example,), _ = sources.load(tmp_path, split="train_prefs")
    # The rejected answer is judged after the chosen's context, though its own earlier turn was another.
    assert example == Example(0, tuple(dialogue("good")[:-1]), "good", "bad", "train_prefs-00000-of-00001.parquet[0]")
    with pytest.raises(
        UserError, match=r"data.turns is 'first', and .* has rejected answers.*set data.turns to 'last'"
    ):
        sources.load(tmp_path, split="train_prefs", turns="first")
    (plain,), _ = sources.load(tmp_path, split="train_prefs", turns="first", columns={"messages": "messages"})
    assert (plain.response, plain.rejected) == ("a", None)


def test_saved_to_disk(tmp_path: pathlib.Path) -> None:
    def data(split: str) -> datasets.Dataset:
        rows = [{"question": f"{split} {n}", "answer": "a"} for n in range(5)]
        return datasets.Dataset.from_list(rows, features=GSM8K)

    datasets.DatasetDict({name: data(name) for name in ("train", "test")}).save_to_disk(tmp_path / "both")
    data("only").select([3, 1]).save_to_disk(tmp_path / "one")
    examples, _ = sources.load(tmp_path / "both", split="test")
    assert [(e.id, e.messages[0]["content"], e.where) for e in examples] == [
        (n, f"test {n}", f"both[{n}]") for n in range(5)
    ]
    assert [e.messages[0]["content"] for e in sources.load(tmp_path / "one", split="any")[0]] == ["only 3", "only 1"]
    with pytest.raises(UserError, match=r"both has no split 'dev'; its splits are train, test: set data.split"):
        sources.load(tmp_path / "both", split="dev")
    (tmp_path / "one" / "data-00000-of-00001.arrow").write_bytes(b"gone")
    with pytest.raises(UserError, match=r"one: datasets.load_from_disk failed with: .*; save the dataset again"):
        sources.load(tmp_path / "one")


# tensorflow-datasets


@pytest.fixture
def tfds() -> Iterator[Any]:
    """The library; no test that takes it may bring TensorFlow in."""
    import tensorflow_datasets

    tensorflow_datasets.disable_progress_bar()
    before = "tensorflow" in sys.modules
    yield tensorflow_datasets
    assert ("tensorflow" in sys.modules) == before


def prepared(tfds: Any, name: str, where: pathlib.Path, features: dict[str, Any], rows: dict[str, list[Any]]) -> None:
    """Writes a dataset in the ArrayRecord format with the library's own builder."""

    def info(self: Any) -> Any:
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def generate(self: Any, split: str) -> Iterator[Any]:
        yield from enumerate(rows[split])

    def splits(self: Any, manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in rows}

    methods = {"VERSION": tfds.core.Version("1.0.0"), "_info": info}
    methods |= {"_generate_examples": generate, "_split_generators": splits}
    builder = type(name, (tfds.core.GeneratorBasedBuilder,), methods, skip_registration=True)
    builder(data_dir=str(where), file_format="array_record").download_and_prepare()


def test_tensorflow_datasets_without_tensorflow(tfds: Any, tmp_path: pathlib.Path) -> None:
    names = ("question", "answer", "annotation", "short_answer")  # tfds's gsm8k
    rows = {
        "train": [dict.fromkeys(names, "x") | {"question": f"wie viel? ü{n}", "answer": f"#### {n}"} for n in range(9)],
        "test": [dict.fromkeys(names, "y")],
    }
    prepared(tfds, "Gsm8k", tmp_path, {name: tfds.features.Text() for name in names}, rows)
    examples, bad = sources.load("tfds:gsm8k", tfds_dir=str(tmp_path))
    assert bad == []
    assert sorted(e.messages[0]["content"] for e in examples) == [f"wie viel? ü{n}" for n in range(9)]
    assert all(e.response == "#### " + e.messages[0]["content"][-1] for e in examples)  # str, not bytes
    assert [(e.id, e.where) for e in examples] == [(n, f"tfds:gsm8k[{n}]") for n in range(9)]
    assert sources.load(f"tfds:{tmp_path}/gsm8k/1.0.0")[0][0].response == examples[0].response
    assert len(sources.load("tfds:gsm8k:1.0.0", split="test", tfds_dir=str(tmp_path))[0]) == 1
    assert len(sources.load("tfds:gsm8k", split="train[:4]", tfds_dir=str(tmp_path))[0]) == 4
    assert len(sources.load_prompts("tfds:gsm8k", tfds_dir=str(tmp_path))[0]) == 9
    assert "tensorflow" not in sys.modules
    with pytest.raises(UserError, match=r"tfds:gsm8k has no split 'validation'; its splits are train, test"):
        sources.load("tfds:gsm8k", split="validation", tfds_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"no column 'reply' .*its columns are .*question"):
        sources.load("tfds:gsm8k", columns={"prompt": "question", "response": "reply"}, tfds_dir=str(tmp_path))


def test_dialogues_of_tensorflow_datasets(tfds: Any, tmp_path: pathlib.Path) -> None:
    turn = {"role": tfds.features.Text(), "content": tfds.features.Text()}
    dialogue = [user("q"), assistant("é")]
    prepared(tfds, "Chats", tmp_path, {"messages": tfds.features.Sequence(turn)}, {"train": [{"messages": dialogue}]})
    (example,), _ = sources.load(f"tfds:{tmp_path}/chats/1.0.0")
    assert (example.messages, example.response) == ((user("q"),), "é")


def test_tensorflow_datasets_that_cannot_be_had(
    tfds: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"'tfds:no_such_set' is not prepared in .*Dataset no_such_set not found"):
        sources.load("tfds:no_such_set", tfds_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"'tfds:.*nowhere' is not prepared in .*nowhere .*set data.tfds_dir"):
        sources.load(f"tfds:{tmp_path}/nowhere")

    def fail(self: Any) -> None:
        raise ConnectionError("no route to host\nand more")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    with pytest.raises(UserError, match=r"'tfds:gsm8k' is not prepared in .*cannot prepare it: no route to host; prep"):
        sources.load("tfds:gsm8k", tfds_dir=str(tmp_path))


def test_tensorflow_datasets_in_tensorflows_format(tfds: Any, tmp_path: pathlib.Path) -> None:
    prepared(tfds, "Old", tmp_path, {"question": tfds.features.Text()}, {"train": [{"question": "q"}]})
    info = tmp_path / "old" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r"cannot be read without TensorFlow: .*file_format=\"array_record\""):
        sources.load("tfds:old", tfds_dir=str(tmp_path))


def test_a_broken_file_of_tensorflow_datasets(tfds: Any, tmp_path: pathlib.Path) -> None:
    names = {"question": tfds.features.Text(), "answer": tfds.features.Text()}
    prepared(tfds, "Broken", tmp_path, names, {"train": [{"question": "q", "answer": "a"}]})
    (file,) = (tmp_path / "broken" / "1.0.0").glob("*array_record*")
    file.write_bytes(b"gone")
    with pytest.raises(UserError, match=r"tfds:broken.* cannot be read"):
        sources.load("tfds:broken", tfds_dir=str(tmp_path))


def test_tfds_prepares_gsm8k_itself(
    tfds: Any, shared: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("importlib_resources")  # tensorflow-datasets needs it to download anything

    def download(self: Any, urls: Any) -> dict[str, pathlib.Path]:
        return {split: shared / "data" / "gsm8k" / f"{split}.jsonl" for split in ("train", "test")}

    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", download)
    examples, _ = sources.load("tfds:gsm8k", split="test", tfds_dir=str(tmp_path))
    local, _ = sources.load(shared / "data" / "gsm8k" / "test.jsonl")
    assert sorted(e.response for e in examples) == sorted(e.response for e in local)
    again, _ = sources.load("tfds:gsm8k", split="test", tfds_dir=str(tmp_path))
    assert again == examples
