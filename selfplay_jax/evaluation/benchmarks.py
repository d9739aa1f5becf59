"""Public benchmarks inside a run: GSM8K as the harness scores it, and any task of lm-evaluation-harness."""

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

from selfplay_jax.data.tokens import Record
from selfplay_jax.errors import UserError
from selfplay_jax.evaluation import gsm8k
from selfplay_jax.evaluation.subject import Result, Subject
from selfplay_jax.evaluation.texts import generate_texts
from selfplay_jax.models import lora
from selfplay_jax.progress import progress


def gsm8k_few_shot(subject: Subject, records: Sequence[Record]) -> Result:
    """gsm8k_strict, gsm8k_flexible: accuracies after `evaluation.shots` training problems, written as lm-eval does."""
    problems = [gsm8k.Problem(record.question, record.target_text) for record in subject.train]
    shots = min(subject.config.evaluation.shots, len(problems))
    return _gsm8k(subject, records, "gsm8k", gsm8k.draw_shots(problems, shots, len(records)))


def gsm8k_zero_shot(subject: Subject, records: Sequence[Record]) -> Result:
    """gsm8k_zero_strict, gsm8k_zero_flexible: the same without worked examples."""
    return _gsm8k(subject, records, "gsm8k_zero", ())


def _gsm8k(subject: Subject, records: Sequence[Record], name: str, shots: Sequence[Sequence[gsm8k.Problem]]) -> Result:
    tokenizer = subject.template.tokenizer
    room = subject.model.config.max_position_embeddings - gsm8k.MAX_NEW_TOKENS

    def write(prompts: list[str]) -> list[str]:
        with progress(f"evaluating: {name}", total=len(prompts), unit="responses") as bar:

            def advance(count: int) -> None:
                bar.advance(count)
                subject.check_stop()

            return generate_texts(
                subject.decode_model,
                subject.decode_params,
                tokenizer,
                [tokenizer.encode(prompt, verbose=False)[-max(room, 1) :] for prompt in prompts],
                until=gsm8k.UNTIL,
                max_new_tokens=gsm8k.MAX_NEW_TOKENS,
                slots=subject.config.evaluation.batch_size,
                mesh=subject.decode_mesh or subject.mesh,
                on_progress=advance,
            )

    problems = [gsm8k.Problem(record.question, record.target_text) for record in records]
    found = gsm8k.evaluate(write, problems, shots)
    return {f"{name}_{key}": value for key, value in found.items() if key not in ("n", "shots")}


def harness_tasks(name: str, include_path: str) -> list[Any]:
    """The tasks of lm-evaluation-harness that a task, group or suite names, with their data loaded.

    Raises:
      UserError: lm_eval is not installed, there is no such task, or its data cannot be loaded.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(
            f"config.evaluation.run has lm_eval/{name}, and lm-evaluation-harness is not installed: "
            "pip install 'selfplay_jax[eval]'"
        )
    from selfplay_jax.evaluation import suites

    manager = _manager(include_path)
    entries = suites.expand(name)
    suites.check(entries, manager)
    return suites.load(entries, manager)


@functools.lru_cache(maxsize=1)
def _manager(include_path: str) -> Any:
    """lm-eval's index of tasks, which takes it ten seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path or None)


def harness(subject: Subject, name: str, limit: int) -> Result:
    """lm_eval/TASK/METRIC for every metric of the tasks, with lm-eval's standard errors; `limit` 0 is all examples."""
    tasks = harness_tasks(name, subject.config.evaluation.lm_eval_path)
    from lm_eval import simple_evaluate

    from selfplay_jax.evaluation.harness import HarnessLM

    model, params = lora.merge(subject.model, subject.params)
    lm = HarnessLM(
        model,
        params,
        subject.template.tokenizer,
        mesh=subject.mesh,
        batch_size=subject.config.evaluation.batch_size,
        decode_params=subject.decode_params,
        decode_mesh=subject.decode_mesh,
        seed=subject.config.seed,
        check_stop=subject.check_stop,
    )
    path = subject.config.evaluation.lm_eval_path
    found = simple_evaluate(model=lm, tasks=tasks, task_manager=_manager(path), limit=limit or None, log_samples=False)
    return _flat(found["results"])


def _flat(results: dict[str, dict[str, Any]]) -> Result:
    """lm-eval's {task: {"acc,none": x, "acc_stderr,none": e}} as {"lm_eval/task/acc": x, "lm_eval/task/acc_se": e}."""
    flat: Result = {}
    for task, metrics in results.items():
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or not isinstance(value, int | float):
                continue
            name = metric.removesuffix("_stderr")
            suffix = "_se" if name != metric else ""
            flat[f"lm_eval/{task}/{name}{'' if kind == 'none' else '/' + kind}{suffix}"] = float(value)
    return flat
