"""The built-in task: its splits, its answers, its tokenizer, and the base that ships."""

import collections
import json
import random
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from selfplay_jax.data import builtin, pretrain
from selfplay_jax.errors import UserError
from selfplay_jax.groups import pack
from selfplay_jax.logprobs import response_logps
from selfplay_jax.models import load_hf

SPLITS = ("train", "validation", "test")
STEP = re.compile(r"(\d+)([+-])(\d+)=(-?\d+)")


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_splits_never_share_a_problem_whatever_seed_and_count():
    asked = {
        split: {e.messages[0]["content"] for seed in (0, 1, 7) for e in builtin.examples(split, 1500, seed)}
        for split in SPLITS
    }
    asked["corpus"] = {prompt for seed in (0, 1) for prompt, _ in builtin.corpus(4000, seed) if "-" in prompt}
    assert all(len(prompts) > 1000 for prompts in asked.values())
    every = [prompt for prompts in asked.values() for prompt in prompts]
    assert len(every) == len(set(every))


def test_part_is_a_function_of_the_problem_and_fills_the_shares():
    counts = collections.Counter(
        builtin.part_of((a, b, c)) for a in range(10, 50) for b in range(10, 50) for c in range(10, 50, 4)
    )
    total = sum(counts.values())
    for name, share in (("corpus", 0.6), ("train", 0.2), ("validation", 0.1), ("test", 0.1)):
        assert abs(counts[name] / total - share) < 0.02


def test_examples_are_fixed_by_the_seed_and_prefixes_agree():
    once = builtin.examples("train", 60, 3)
    assert once == builtin.examples("train", 60, 3)
    assert once[:20] == builtin.examples("train", 20, 3)
    assert once != builtin.examples("train", 60, 4)
    assert [e.id for e in once] == list(range(60))
    assert builtin.corpus(50, 3) == builtin.corpus(50, 3) != builtin.corpus(50, 4)


@pytest.mark.parametrize("split", SPLITS)
def test_every_target_works_its_problem_out(split):
    for example in builtin.examples(split, 400, 11):
        (message,) = example.messages
        assert message["role"] == "user"
        a, b, c = numbers(message["content"])
        assert message["content"] == f"{a}+{b}-{c}="
        first, second = STEP.findall(example.response)
        assert {first[0], first[2]} == {str(a), str(b)} and first[1] == "+" and int(first[3]) == a + b
        assert second == (str(a + b), "-", str(c), str(a + b - c))
        final = re.findall(r"#\s*(-?\d+)", example.response)
        assert final == [str(a + b - c)]
        assert example.response.endswith(f"#{a + b - c}")
        assert example.rejected is not None and example.rejected != example.response


def test_texts_fit_the_declared_limits():
    pairs = builtin.corpus(5000, 0)
    assert max(len(prompt) for prompt, _ in pairs) <= builtin.PROMPT_LIMIT
    assert max(len(response) for _, response in pairs) + 1 <= builtin.RESPONSE_LIMIT
    assert set("".join(prompt + response for prompt, response in pairs)) <= set(builtin.CHARACTERS)


def test_slips_are_slips():
    rng = random.Random(0)
    for _ in range(300):
        text = builtin.worked((23, 38, 45), rng, slip=True)
        wrong = [s for s in STEP.findall(text) if eval("".join(s[:3])) != int(s[3])]
        final = re.search(r"#(-?\d+)", text)
        assert text.endswith("?") or wrong or int(final[1]) != 16
        assert final is None or int(final[1]) != 16


def test_asking_for_the_impossible_is_one_sentence():
    with pytest.raises(UserError, match="no split 'dev'"):
        builtin.examples("dev", 1, 0)
    with pytest.raises(UserError, match="ask for fewer"):
        builtin.examples("test", 1_000_000, 0)


def test_tokenizer_keeps_every_character(tmp_path):
    from transformers import AutoTokenizer

    builtin.save_tokenizer(tmp_path)
    for directory in (tmp_path, builtin.BASE):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        ids = tokenizer(builtin.CHARACTERS)["input_ids"]
        assert len(set(ids)) == len(ids) == len(builtin.CHARACTERS)
        assert tokenizer.decode(ids) == builtin.CHARACTERS
        for character in builtin.CHARACTERS:
            assert tokenizer.decode(tokenizer(character)["input_ids"]) == character
        assert tokenizer("A")["input_ids"] == [tokenizer.unk_token_id]
        specials = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token]
        assert specials == list(builtin.SPECIALS) and tokenizer.bos_token is None
        assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2]
        assert len(tokenizer) == len(builtin.SPECIALS) + len(builtin.CHARACTERS)


def test_shipped_base_is_an_ordinary_llama_directory():
    from transformers import AutoConfig

    model, params = load_hf(builtin.BASE)
    assert model.config.family == "llama"
    assert model.config.stop_ids == (builtin.SPECIALS.index(builtin.EOS),)
    config = AutoConfig.from_pretrained(builtin.BASE)
    assert config.model_type == "llama" and config.vocab_size == model.config.vocab_size
    made = json.loads((builtin.BASE / "config.json").read_text())["pretraining"]
    assert made["steps"] == pretrain.STEPS and "seed" in made
    assert sum(path.stat().st_size for path in builtin.BASE.iterdir()) < 2_000_000
    assert 80_000 < sum(leaf.size for leaf in jax.tree.leaves(params)) < 120_000


def test_shipped_base_knows_the_skill():
    model, params = load_hf(builtin.BASE)
    problems = builtin.examples("test", 64, 0)
    wrong = [builtin.worked((10, 49, 10 + i % 40), random.Random(i)) for i in range(64)]

    def average(texts: list[str]) -> float:
        rows = [[[*pretrain.ids(text), builtin.SPECIALS.index(builtin.EOS)]] for text in texts]
        group = pack([pretrain.ids(e.messages[0]["content"]) for e in problems], rows)
        return float(np.mean(jax.jit(response_logps, static_argnums=0)(model, params, group)))

    right = [example.response for example in problems]
    uniform = -np.mean([len(text) + 1 for text in right]) * np.log(model.config.vocab_size)
    assert average(right) > uniform / 6
    assert average(right) > average(wrong) + 10


def test_pretraining_writes_a_loadable_directory(tmp_path):
    command = [sys.executable, "-m", "selfplay_jax.data.builtin", "--pretrain", "--steps", "2", "--seed", "5"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "base")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "loss" in done.stdout and "accuracy" in done.stdout
    model, params = load_hf(tmp_path / "base")
    assert model.config == load_hf(builtin.BASE)[0].config
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert json.loads((tmp_path / "base" / "config.json").read_text())["pretraining"] == {
        "script": "python -m selfplay_jax.data.builtin --pretrain",
        "seed": 5,
        "steps": 2,
    }
    assert (tmp_path / "base" / "tokenizer.json").read_bytes() == (builtin.BASE / "tokenizer.json").read_bytes()


def test_without_pretrain_it_prints_examples():
    done = subprocess.run(
        [sys.executable, "-m", "selfplay_jax.data.builtin"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all(re.fullmatch(r"\d+\+\d+-\d+=\t.+#\d+", line) for line in lines)
