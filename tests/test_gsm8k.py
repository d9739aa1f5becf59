"""GSM8K's prompts and scores against lm-eval's own task: its YAML file's filters, its metric, its few-shot contexts."""

import itertools
import json
import pathlib
import random

import numpy as np
import pytest

from selfplay_jax.evaluation import gsm8k
from selfplay_jax.evaluation.gsm8k import Problem

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TRAIN = [
    Problem(
        f"Ann has {a} apples, eats {b} and buys {c}.\nHow many are left?", f"{a}-{b}={a - b}\n{a - b}+{c}\n#### {n}"
    )
    for a, b, c, n in ((9, 2, 5, "12"), (1200, 100, 9, "1,109"), (4, 1, 1, "4"), (50, 10, 2, "42"), (3, 3, 7, "7"))
]
TEST = [Problem(f"Bob {verb} {{twice}} 2 {{{{ cows }}}}?", f"so\n#### {i}") for i, verb in enumerate(("saw", "sold"))]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """lm-eval's gsm8k with local data in place of the Hub's."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    folder = tmp_path_factory.mktemp("gsm8k")
    for split, problems in (("train", TRAIN), ("test", TEST)):
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(p._asdict()) for p in problems))
    config = load_yaml(pathlib.Path(lm_eval.tasks.__file__).parent / "gsm8k" / "gsm8k.yaml", resolve_func=False)
    assert config["metadata"]["version"] == 3.0
    config |= {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")},
            "cache_dir": str(folder / "cache"),
        },
    }
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    (task,) = manager.load([config])["tasks"].values()
    return task


@pytest.mark.parametrize("count", [0, 1, 3])
def test_prompts_are_lm_eval_s(task, count):
    shots = gsm8k.draw_shots(TRAIN, count, len(TEST))
    task.set_fewshot_seed(1234)  # lm-eval's default
    plain = [task.fewshot_context(problem._asdict(), count) for problem in TEST]
    assert [gsm8k.few_shot_prompt(p.question, worked) for p, worked in zip(TEST, shots, strict=True)] == plain
    task.set_fewshot_seed(1234)
    chats = [
        task.fewshot_context(
            problem._asdict(), count, apply_chat_template=True, fewshot_as_multiturn=True,
            chat_template=lambda messages, add_generation_prompt: json.dumps(messages),
        )
        for problem in TEST
    ]  # fmt: skip
    found = [gsm8k.few_shot_messages(p.question, worked) for p, worked in zip(TEST, shots, strict=True)]
    assert found == list(map(json.loads, chats))


def lm_eval_scores(task, texts, answers):
    """Both readings by the task's filters and metric."""
    from lm_eval.api.instance import Instance

    instances = [
        Instance("generate_until", {"question": "q", "answer": answer}, ("", {}), 0, resps=[text])
        for text, answer in zip(texts, answers, strict=True)
    ]
    for ensemble in task._filters:
        ensemble.apply(instances)
    names = {"strict": "strict-match", "flexible": "flexible-extract"}
    return {
        ours: np.array(
            [task.process_results(i.doc, [i.filtered_resps[theirs]])["exact_match"] for i in instances], bool
        )
        for ours, theirs in names.items()
    }


HANDMADE = [
    "", "42", "#### 42", "#### 42.", "#### -42", "####42", "####  42", "#### $42", "#### 1,234", "#### 1,234.00",
    "#### 42\n#### 43", "it is 41\n#### 42 apples", "the answer is 42.", "the answer is 42. ", "The answer is $42.00",
    "it costs $42", "$1,234", "1 234", "42,", "42..", "4.2", "-42", "- 42", "--42", "9-42", "#### .5", "#### 0.50",
    "#### ,", "#### .", "...", "$$", "no number", "#### x", "#### ", "####", "1,109 cows", "#### 1109", "42%", "x42y",
    "#### 42 and 7", "7", "#### 7", "\u0664\u0662", "4\n2", "[invalid]", "#### 42\n\nQuestion: 7", "10" * 40, ".5",
    "a #### 7 #### 42", "<<40+2=42>>42", "#### $", "$", "42 $", "7, 8, 42, ", "#### -1,234.", "-$42", "$-42", "-.5",
    "#### 1e3", "\u0130 42",
]  # fmt: skip
ANSWERS = [
    "work\n#### 42", "#### 1,234", "42", "#### -42", "#### 0.50", "#### 7\n#### 42", "1,109", "#### 42.", "",
    "[invalid]", "#### $42", "x\n#### 1109\n", "####42", "#### [INVALID]",
]  # fmt: skip


def test_scores_are_lm_eval_s_on_handmade_texts(task):
    texts, answers = zip(*itertools.product(HANDMADE, ANSWERS), strict=True)
    found, wanted = gsm8k.score(texts, answers), lm_eval_scores(task, texts, answers)
    for name in wanted:
        wrong = [(t, a) for t, a, f, w in zip(texts, answers, found[name], wanted[name], strict=True) if f != w]
        assert not wrong, name
        assert wanted[name].sum() > 20 and found[name].dtype == bool
    assert (found["strict"] != found["flexible"]).sum() > 20


def test_scores_are_lm_eval_s_on_random_texts(task):
    rng = random.Random(0)
    pieces = ["#### ", "####", "4", "2", "42", "$", ",", ".", "-", " ", "\n", "x", "0", "=", "Answer", "#"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 9))) for _ in range(4000)]
    # Half of the answers are what one of the readings finds, so that many are right.
    answers = [
        rng.choice([gsm8k.strict_answer(t), gsm8k.flexible_answer(t), "#### 42", rng.choice(texts)]) for t in texts
    ]
    found, wanted = gsm8k.score(texts, answers), lm_eval_scores(task, texts, answers)
    for name in wanted:
        wrong = [(t, a) for t, a, f, w in zip(texts, answers, found[name], wanted[name], strict=True) if f != w]
        assert not wrong, name
        assert 1000 < wanted[name].sum() < 3800


def test_limits_are_lm_eval_s(task):
    assert tuple(task.config.generation_kwargs["until"]) == gsm8k.UNTIL
    assert not task.config.generation_kwargs["do_sample"]
    assert task.config.num_fewshot == gsm8k.SHOTS
    from lm_eval.models.utils import normalize_gen_kwargs

    assert normalize_gen_kwargs({})["max_gen_toks"] == gsm8k.MAX_NEW_TOKENS


def test_evaluate_counts_and_asks_once():
    asked = []

    def generate_texts(prompts):
        asked.extend(prompts)
        return ["#### 0", "it is 1"]

    result = gsm8k.evaluate(generate_texts, TEST, [TRAIN[:2], TRAIN[2:4]])
    first, second = TEST[0].question, TEST[1].question
    assert asked == [gsm8k.few_shot_prompt(first, TRAIN[:2]), gsm8k.few_shot_prompt(second, TRAIN[2:4])]
    assert result == {
        "n": 2, "shots": 2, "strict": 0.5, "strict_se": pytest.approx(0.5), "flexible": 1.0, "flexible_se": 0.0,
    }  # fmt: skip
    gsm8k.evaluate(generate_texts, TEST, chat=lambda messages: "|".join(m["content"] for m in messages))
    assert asked[2:] == [f"Question: {p.question}\nAnswer:" for p in TEST]
    with pytest.raises(ValueError, match="argument"):
        gsm8k.evaluate(generate_texts, TEST, [TRAIN[:2]])


def test_the_real_answers_are_right_by_themselves(shared):
    rows = [json.loads(line) for line in (shared / "data" / "gsm8k" / "test.jsonl").read_text().splitlines()]
    answers = [row["answer"] for row in rows]
    right = gsm8k.score(answers, answers)
    assert right["strict"].all() and right["flexible"].all() and len(rows) == 1319
    wrong = gsm8k.score(answers, answers[1:] + answers[:1])
    assert wrong["strict"].mean() < 0.05
