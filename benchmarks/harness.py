"""lm-evaluation-harness with its own `hf` backend and with ours: the same tasks, model and machine, in one run.

    python benchmarks/harness.py [--tokenizer=DIR] [--scale=1] [--batch_size=16]

The model is random and shaped like Qwen2 with about ten million parameters; the tasks are local and shaped like the
leaderboards': letters after a long context (MMLU), four long endings of a long context (HellaSwag), generation until a
stop string (GSM8K), whole texts (perplexity). Only the time inside the backends is counted. Ours runs twice: the first
time it compiles. Needs torch and accelerate beside lm-eval; says so where they are missing.
"""

import argparse
import importlib.util
import json
import logging
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time
from typing import Any

import numpy as np

_TOKENIZER = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tokenizers" / "minimind"
_LENGTH = 1024
_WORDS = str.split(
    "the of and to in a is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man"
)
_CHOICE = (
    'output_type: multiple_choice\ndoc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: gold\n'
    "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
)
_TASKS = {
    "letters": _CHOICE,
    "endings": _CHOICE,
    "generation": 'output_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
    'metric_list: [{metric: exact_match}]\ngeneration_kwargs: {until: ["Question:", "qu"], max_gen_toks: 64}\n',
    "perplexity": 'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{question}}"\n'
    "metric_list: [{metric: byte_perplexity}]\n",
}


def write_model(folder: pathlib.Path, tokenizer: pathlib.Path) -> None:
    """A random model as a Hugging Face directory, with the given tokenizer."""
    import jax
    from transformers import AutoTokenizer

    from selfplay_jax.models import Model, ModelConfig, save_hf

    theirs = AutoTokenizer.from_pretrained(tokenizer)
    config = ModelConfig(
        family="qwen2",
        vocab_size=len(theirs),
        hidden_size=256,
        intermediate_size=1024,
        num_layers=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        tie_embeddings=True,
        qkv_bias=True,
        max_position_embeddings=_LENGTH,
        stop_ids=(theirs.eos_token_id,),
    )
    model = Model(config)
    params = model.init(jax.random.key(0))
    # As loud as a trained model: at 0.02 all tokens would be about equally likely, and ties would decide.
    params = jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 2 else leaf, params)
    print(f"model: {sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e6:.1f}M parameters, float32")
    save_hf(folder, model, params)
    for file in tokenizer.glob("*token*"):
        shutil.copy(file, folder / file.name)


def write_tasks(folder: pathlib.Path, scale: float) -> None:
    """The tasks' YAML files and their data."""
    rng = random.Random(0)

    def text(low: int, high: int) -> str:
        return " ".join(rng.choices(_WORDS, k=rng.randint(low, high)))

    data: dict[str, list[dict[str, Any]]] = {
        "letters": [
            {"question": text(200, 500), "choices": list("ABCD"), "gold": rng.randrange(4)}
            for _ in range(int(32 * scale))
        ],
        "endings": [
            {"question": text(200, 400), "choices": [text(5, 40) for _ in range(4)], "gold": rng.randrange(4)}
            for _ in range(int(32 * scale))
        ],
        "generation": [{"question": text(50, 300), "answer": "x"} for _ in range(int(32 * scale))],
        "perplexity": [{"question": text(100, 800)} for _ in range(int(32 * scale))],
    }
    for name, rows in data.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ntest_split: test\nmetadata: {{version: 1}}\ndataset_kwargs:\n"
            f"  data_files: {{test: {folder}/{name}.jsonl}}\n  cache_dir: {folder}/cache\n{_TASKS[name]}"
        )


class Timed:
    """Counts the requests and seconds that pass through a backend's three methods."""

    def __init__(self, lm: Any):
        self.requests, self.seconds, self.cpu = 0, 0.0, 0.0
        for name in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
            setattr(lm, name, self._wrap(getattr(type(lm), name).__get__(lm)))

    def _wrap(self, method: Any) -> Any:
        def timed(requests: Any, **kwargs: Any) -> Any:
            began, cpu_began = time.perf_counter(), time.process_time()
            answers = method(requests, **kwargs)
            self.seconds += time.perf_counter() - began
            self.cpu += time.process_time() - cpu_began
            self.requests += len(requests)
            return answers

        return timed


def answers(lm: Any, folder: pathlib.Path, task: str) -> tuple[list[Any], Timed]:
    """The answers to all requests of one task, and what they took."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    timed = Timed(lm)
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer for s in samples for resp in s["resps"] for answer in resp], timed


def equal(ours: list[Any], theirs: list[Any]) -> bool:
    """The same texts and greedy flags, log-likelihoods within 1e-3."""

    def split(side: list[Any]) -> tuple[list[Any], list[float]]:
        flat = [part for answer in side for part in (answer if isinstance(answer, (tuple, list)) else [answer])]
        return [x for x in flat if not isinstance(x, float)], [x for x in flat if isinstance(x, float)]

    (exact, numbers), (their_exact, their_numbers) = split(ours), split(theirs)
    return exact == their_exact and bool(np.allclose(numbers, their_numbers, rtol=1e-6, atol=1e-3))


def line(name: str, values: np.ndarray, digits: int, last: str = "") -> str:
    """A row of the table: hf, ours with compiling, ours, and how many times faster ours is; rates or times."""
    ratios = values[1:] / values[0] if last else values[0] / values[1:]
    cells = [f"{value:.{digits}f}" for value in values] + [f"{ratio:.2f}" for ratio in ratios]
    return "| " + " | ".join([name, *cells, last]) + " |"


def main() -> int:
    """Prints the table; exit code 1 where something is missing or the answers differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=pathlib.Path, default=_TOKENIZER, help="a directory with tokenizer.json")
    parser.add_argument("--scale", type=float, default=1.0, help="how many times 32 documents a task")
    parser.add_argument("--batch_size", type=int, default=16)
    options = parser.parse_args()
    missing = [name for name in ("lm_eval", "torch", "accelerate") if importlib.util.find_spec(name) is None]
    if missing or not (options.tokenizer / "tokenizer.json").is_file():
        need = f"the packages {', '.join(missing)}" if missing else f"a tokenizer: {options.tokenizer} has none"
        print(f"this benchmark needs {need}", file=sys.stderr)
        return 1
    os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from lm_eval.models.huggingface import HFLM

    from selfplay_jax.data.templates import load_tokenizer
    from selfplay_jax.evaluation.harness import HarnessLM
    from selfplay_jax.evaluation.load import load_model

    logging.disable(logging.WARNING)
    same = True
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_model(folder / "model", options.tokenizer)
        write_tasks(folder, options.scale)
        theirs = HFLM(str(folder / "model"), device="cpu", dtype="float32", batch_size=options.batch_size)
        model, params, source = load_model(folder / "model")
        ours = HarnessLM(model, params, load_tokenizer(source), batch_size=options.batch_size)
        print(f"batch size {options.batch_size}, {torch.get_num_threads()} torch threads, {os.cpu_count()} cores\n")
        print("| requests/s | hf | ours with compiling | ours | ratio with compiling | ratio | answers |")
        print("|---|---|---|---|---|---|---|")
        seconds, cpu = np.zeros(3), np.zeros(3)
        for task in _TASKS:
            expected, hf = answers(theirs, folder, task)
            first, cold = answers(ours, folder, task)
            second, warm = answers(ours, folder, task)
            agree = equal(first, expected) and equal(second, expected)
            same = same and agree
            took = np.array([timed.seconds for timed in (hf, cold, warm)])
            seconds, cpu = seconds + took, cpu + [timed.cpu for timed in (hf, cold, warm)]
            print(line(task, hf.requests / took, 2, "equal" if agree else "DIFFERENT"), flush=True)
        print(line("all, seconds", seconds, 1))
        print(line("all, CPU seconds", cpu, 1))
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
