"""One checkpoint on held-out records: the evaluations that `config.evaluation.run` lists, by name.

greedy, sampled     accuracy of the final answer, greedy and at temperature 1
likelihood          log π(y|x) of the annotated answers, per answer and per token
wins                own samples against the annotated answers: which the policy finds likelier, which it rewards
gsm8k, gsm8k_zero   GSM8K as lm-evaluation-harness scores it, with `evaluation.shots` worked examples, or none
lm_eval/TASK        a task or group of lm-evaluation-harness
"""

import difflib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from selfplay_jax.data.tokens import Record
from selfplay_jax.errors import UserError
from selfplay_jax.evaluation import benchmarks
from selfplay_jax.evaluation.exact_match import Answers, mean_and_error
from selfplay_jax.evaluation.subject import Result, Subject

_HARNESS = "lm_eval/"


def _accuracy(subject: Subject, records: Sequence[Record], name: str, temperature: float, copies: int) -> Result:
    samples = subject.generate(name, [record.prompt for record in records], temperature, copies)
    texts = [subject.template.decode(tokens) for tokens in samples.tokens]
    targets = [record.target_text for record in records for _ in range(copies)]
    right = Answers(subject.config.evaluation.answer).correct(texts, targets) & samples.finished
    return _mean(name, right.reshape(len(records), copies).mean(axis=1))


def _greedy(subject: Subject, records: Sequence[Record]) -> Result:
    return _accuracy(subject, records, "greedy_accuracy", 0.0, 1)


def _sampled(subject: Subject, records: Sequence[Record]) -> Result:
    return _accuracy(subject, records, "sampled_accuracy", 1.0, subject.config.evaluation.samples_per_prompt)


def _likelihood(subject: Subject, records: Sequence[Record]) -> Result:
    logps = subject.score(subject.params, records, [[record.target] for record in records])[:, 0]
    tokens = sum(len(record.target) for record in records)
    return _mean("target_logp", logps) | {"target_nll_per_token": -float(logps.sum()) / tokens}


def _wins(subject: Subject, records: Sequence[Record]) -> Result:
    """Shares of prompts whose annotated answer y beats the policy's own sample y'.

    wins_logp: log π(y) > log π(y'). wins_reward: the log ratio to θ_0 is larger for y. wins_reward_only: larger reward
    though smaller log-likelihood, the share that T-SPIN's Figure 3 shows. Prompts with y' = y are left out.
    """
    samples = subject.generate("wins", [record.prompt for record in records], 1.0, 1)
    pairs = [(r, [r.target, z]) for r, z in zip(records, samples.tokens, strict=True) if z != r.target]
    if not pairs:
        return {"wins_n": 0}
    records, columns = [record for record, _ in pairs], [column for _, column in pairs]
    policy = subject.score(subject.params, records, columns)
    logp = policy[:, 0] > policy[:, 1]
    result = {"wins_n": len(pairs)} | _mean("wins_logp", logp)
    if subject.start is None:
        return result
    rewards = policy - subject.score(subject.start(), records, columns)
    reward = rewards[:, 0] > rewards[:, 1]
    return result | _mean("wins_reward", reward) | _mean("wins_reward_only", reward & ~logp)


def _mean(name: str, values: np.ndarray) -> Result:
    mean, error = mean_and_error(np.asarray(values, np.float64))
    return {name: mean, f"{name}_se": error}


EVALUATIONS: Mapping[str, Callable[[Subject, Sequence[Record]], Result]] = {
    "greedy": _greedy,
    "sampled": _sampled,
    "likelihood": _likelihood,
    "wins": _wins,
    "gsm8k": benchmarks.gsm8k_few_shot,
    "gsm8k_zero": benchmarks.gsm8k_zero_shot,
}


def parse(run: str) -> list[tuple[str, int]]:
    """ "greedy:200,likelihood" as [("greedy", 200), ("likelihood", 0)]; 0 is all examples.

    Raises:
      UserError: a name that is no evaluation, or a count that is no positive number.
    """
    wanted = []
    for part in filter(None, (part.strip() for part in run.split(","))):
        name, colon, count = part.rpartition(":") if ":" in part else (part, "", "")
        if name not in EVALUATIONS and not name.startswith(_HARNESS):
            close = difflib.get_close_matches(name, EVALUATIONS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(EVALUATIONS)} and lm_eval/TASK."
            raise UserError(f"config.evaluation.run has {name!r}, which is no evaluation; {hint}")
        if colon and not (count.isdecimal() and int(count) > 0):
            raise UserError(f"config.evaluation.run has {part!r}: after the colon stands a number of examples.")
        wanted.append((name, int(count or 0)))
    return wanted


def check(run: str, lm_eval_path: str) -> None:
    """Raises a UserError for what `run` lists and the evaluations could not do; loads the data of harness tasks."""
    for name, _ in parse(run):
        if name.startswith(_HARNESS):
            benchmarks.harness_tasks(name.removeprefix(_HARNESS), lm_eval_path)


def evaluate(subject: Subject, test: Sequence[Record], validation: Sequence[Record]) -> Result:
    """Numbers of one checkpoint with their standard errors over prompts (`NAME_se`).

    The listed evaluations run on the test records (the first so many, where a number is given). On the validation
    records runs what `evaluation.select` ranks checkpoints by; its numbers are called validation_*.
    """
    settings = subject.config.evaluation
    result: Result = {"n": len(test)}
    for name, count in parse(settings.run):
        if name.startswith(_HARNESS):
            result |= benchmarks.harness(subject, name.removeprefix(_HARNESS), count)
        elif test:
            result |= EVALUATIONS[name](subject, test[: count or None])
    if validation:
        ranking = [_likelihood] + ([_sampled] if settings.select == "sampled_accuracy" else [])
        for run in ranking:
            result |= {f"validation_{name}": value for name, value in run(subject, validation).items()}
    return result
