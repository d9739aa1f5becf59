"""Named sets of benchmarks beside lm-evaluation-harness' own tasks and groups."""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

from selfplay_jax.errors import UserError


class Entry(NamedTuple):
    """A task or group of lm-eval by name; shots None leaves the number of examples in the prompt to lm-eval."""

    task: str
    shots: int | None = None


_OPEN_LLM_V1 = (
    Entry("arc_challenge", 25),
    Entry("hellaswag", 10),
    Entry("mmlu", 5),
    Entry("truthfulqa_mc2", 0),
    Entry("winogrande", 5),
    Entry("gsm8k", 5),
)
# lm-eval's group fixes the numbers itself: IFEval 0, BBH 3, MATH-hard 4, GPQA 0, MuSR 0, MMLU-Pro 5.
_OPEN_LLM_V2 = (Entry("leaderboard"),)

# TPAW evaluates on both leaderboards. T-SPIN's paper (arXiv 2601.08198) takes its tasks (GSM8K, HellaSwag, WinoGrande,
# IFEval, ...) from the same two; its exact list is not restated here, so `tspin` runs all of them.
SUITES: dict[str, tuple[Entry, ...]] = {
    "open_llm_v1": _OPEN_LLM_V1,
    "open_llm_v2": _OPEN_LLM_V2,
    "tspin": _OPEN_LLM_V1 + _OPEN_LLM_V2,
    "tpaw": _OPEN_LLM_V1 + _OPEN_LLM_V2,
}


def expand(names: str) -> list[Entry]:
    """The entries that a comma-separated list of suites, tasks and groups names; each task once, as first named."""
    entries: dict[str, Entry] = {}
    for name in filter(None, (name.strip() for name in names.split(","))):
        for entry in SUITES.get(name, (Entry(name),)):
            entries.setdefault(entry.task, entry)
    if not entries:
        raise UserError("no task is named; give names separated by commas, e.g. leaderboard,gsm8k")
    return list(entries.values())


def check(entries: Sequence[Entry], manager: Any) -> None:
    """Raises UserError for a name that an `lm_eval.tasks.TaskManager` does not know; near matches are named."""
    for entry in entries:
        if entry.task not in manager.task_index:
            close = difflib.get_close_matches(entry.task, [*SUITES, *manager.all_tasks], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"suites are {', '.join(SUITES)}"
            raise UserError(f"lm-eval has no task or group {entry.task!r}; {hint}")


def load(entries: Sequence[Entry], manager: Any) -> list[Any]:
    """lm-eval's tasks and groups of the entries, with the suites' numbers of shots set.

    Raises:
      UserError: a task's data or definition cannot be loaded, or two entries hold the same task.
    """
    loaded: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for entry in entries:
        try:
            found = manager.load([entry.task])
        except Exception as error:  # the Hub's, datasets', YAML's and the task's own exceptions
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"task {entry.task}: its data or definition cannot be loaded (is the network there, or its data in the "
                f"Hub's cache?): {reason:.300}"
            ) from error
        for name, task in found["tasks"].items():
            if owners.setdefault(name, entry.task) != entry.task:
                raise UserError(f"--tasks names {name} twice, by {owners[name]} and {entry.task}: leave one out")
            if entry.shots is not None:
                task.set_config(key="num_fewshot", value=entry.shots)
        group = found.get("groups", {}).get(entry.task)
        loaded |= found["tasks"] if group is None else {entry.task: group}
    return list(loaded.values())
