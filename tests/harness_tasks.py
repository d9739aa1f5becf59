"""Local lm-eval tasks on local data, and the answers that a plain reading of the harness' rules gives in float64.

The texts fit both test models: the built-in one (one token a character, 64 positions, no BOS) and a BPE one with BOS.
"""

import dataclasses
import json
import pathlib
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from tiny_models import reference_logits

NAMES = ("tom", "lily", "ben", "the big dog", "a little girl named sue")
THINGS = ("a ball", "the park", "a red car", "some cake", "his mom and dad")

_FILES = """
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/{data}.jsonl, test: {folder}/{data}.jsonl}}
  cache_dir: {folder}/cache
training_split: train
test_split: test
metadata: {{version: 1}}
"""
_CHOICE = """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
_STORY = """
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{end}}"
metric_list: [{metric: exact_match}]
generation_kwargs:
"""
TASKS = {
    "toy_choice": ("choice", _CHOICE + "num_fewshot: 0\n"),
    "toy_choice_shots": ("choice", _CHOICE + "num_fewshot: 2\n"),
    "toy_story": ("story", _STORY + '  until: ["\\n", " and"]\n  max_gen_toks: 40\n'),
    "toy_story_shots": ("story", _STORY + '  until: [".", "#", "?"]\n  max_gen_toks: 24\nnum_fewshot: 1\n'),
    "toy_text": (
        "text",
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
        "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
    ),
}


def write_tasks(folder: pathlib.Path) -> pathlib.Path:
    """Writes the tasks, their data and a group of all of them; returns the folder."""
    for data, rows in _data(random.Random(0)).items():
        (folder / f"{data}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, (data, text) in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{_FILES.format(folder=folder, data=data)}{text}")
    (folder / "toy.yaml").write_text("group: toy\ntask: [" + ", ".join(TASKS) + "]\nmetadata: {version: 1}\n")
    return folder


def _data(rng: random.Random) -> dict[str, list[dict[str, Any]]]:
    choices = []
    for i in range(12):
        question = f"one day {rng.choice(NAMES)} saw {rng.choice(THINGS)}. then"
        # Trailing spaces belong to the choice; some contexts are empty, some far longer than the models' length.
        question = {3: "", 5: question + "  ", 7: " ".join(rng.choice(THINGS) for _ in range(150))}.get(i, question)
        options = [f" {rng.choice(NAMES)} saw {thing}" for thing in rng.sample(THINGS, 2 + i % 3)] + [" it"]
        choices.append({"question": question, "choices": options, "gold": rng.randrange(len(options))})
    again = choices[0]
    choices.append({**again, "choices": again["choices"][::-1], "gold": 0})  # the same questions in another order
    stories = [{"start": f"once upon a time {name} had", "end": " a ball."} for name in NAMES]
    stories += [{"start": "12+34-5", "end": "#41"}, {"start": "40+21-13=", "end": "#48"}, stories[0]]
    stories.append({"start": " ".join(rng.choice(THINGS) for _ in range(120)), "end": " the"})
    texts = [" ".join(rng.choice(NAMES + THINGS) for _ in range(count)) for count in (1, 3, 12, 60, 260)]
    return {"choice": choices, "story": stories, "text": [{"text": text} for text in texts]}


def manager(folder: pathlib.Path) -> Any:
    """lm-eval's manager of the local tasks alone: reading all of its own takes long."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(lm: Any, folder: pathlib.Path, tasks: list[str]) -> dict[str, Any]:
    """lm-eval's results with samples."""
    from lm_eval import simple_evaluate

    return simple_evaluate(
        model=lm, tasks=tasks, task_manager=manager(folder), log_samples=True, bootstrap_iters=0, batch_size=1
    )


def answers(results: dict[str, Any]) -> dict[str, list[Any]]:
    """By task, the model's answers to all requests, in the documents' order."""
    by_task = {}
    for task, samples in results["samples"].items():
        ordered = sorted(samples, key=lambda sample: sample["doc_id"])
        by_task[task] = [answer for sample in ordered for resp in sample["resps"] for answer in resp]
    return by_task


@dataclasses.dataclass(frozen=True)
class Oracle:
    """The harness' rules read plainly, for one request at a time, on NumPy's float64 forward pass."""

    config: Any
    params: Any
    tokenizer: Any
    max_length: int

    def encode(self, text: str) -> list[int]:
        begun = text.startswith(self.tokenizer.decode(self.prefix))
        return self.tokenizer.encode(text, add_special_tokens=not begun)

    @property
    def prefix(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def tokens(self, context: list[int], continuation: list[int]) -> tuple[float, bool]:
        """(log-likelihood, is_greedy); the last `max_length` inputs count."""
        row = (context + continuation)[-(self.max_length + 1) :]
        logits = reference_logits(self.config, self.params, row[:-1])[-len(continuation) :]
        top = logits.max(-1, keepdims=True)
        logps = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        return float(logps[np.arange(len(continuation)), continuation].sum()), (
            logits.argmax(-1).tolist() == continuation
        )

    def loglikelihood(self, context: str, continuation: str) -> tuple[float, bool]:
        stripped = context.rstrip()
        if not stripped and not context:
            return self.tokens([self.prefix], self.tokenizer.encode(continuation, add_special_tokens=False))
        whole, head = self.encode(context + continuation), self.encode(stripped)
        return self.tokens(head, whole[len(head) :])

    def rolling(self, text: str) -> float:
        """Each token once; a window ends with its last prediction and reaches back as far as the model sees."""
        tokens, total = self.encode(text), 0.0
        row = [self.prefix, *tokens]  # row[i] stands before tokens[i]
        for start in range(0, len(tokens), self.max_length):
            end = min(start + self.max_length, len(tokens))
            total += self.tokens(row[max(0, end - self.max_length) : start + 1], tokens[start:end])[0]
        return total

    def greedy_tokens(self, row: list[int], most: int, until: Sequence[str] = ()) -> list[int]:
        drawn: list[int] = []
        while len(drawn) < most:
            drawn.append(int(reference_logits(self.config, self.params, row + drawn)[-1].argmax()))
            if drawn[-1] in (*self.config.stop_ids, self.tokenizer.eos_token_id):
                break
            if any(stop in self.tokenizer.decode(drawn) for stop in until):
                break
        return drawn

    def greedy(self, context: str, until: list[str], most: int) -> str:
        drawn = self.greedy_tokens(self.encode(context)[-(self.max_length - most) :], most, until)
        text = self.tokenizer.decode(drawn, skip_special_tokens=True)
        return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]


MODELS = ("builtin", "tinystories")


def model_directory(name: str, request: pytest.FixtureRequest) -> pathlib.Path:
    """Where a test model lies; skips where third-party files are missing."""
    from selfplay_jax.data import builtin

    if name == "builtin":
        return pathlib.Path(builtin.BASE)
    return request.getfixturevalue("shared") / "models" / "tinystories-656k"
