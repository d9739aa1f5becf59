"""One checkpoint on the held-out records: greedy and sampled accuracy, log-likelihood of the annotated answers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from selfplay_jax.data.templates import Template
from selfplay_jax.data.tokens import Record
from selfplay_jax.evaluation.exact_match import Answers, mean_and_error
from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.progress import progress
from selfplay_jax.sampling import generate
from selfplay_jax.scoring import score

# Evaluation draws from streams of its own, the same ones for every checkpoint, so that checkpoints are compared on
# common random numbers.
_SEED_OFFSET = 1_000_003


def evaluate(
    model: Model,
    params: Params,
    decode_params: Params,
    test: Sequence[Record],
    validation: Sequence[Record],
    template: Template,
    config: Any,
    *,
    mesh: Mesh,
    check_stop: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Numbers of one checkpoint, all with standard errors (`_se`) over prompts.

    greedy_accuracy, sampled_accuracy (temperature 1): share of responses that end in the target's answer;
    target_logp: mean log π(y|x) of the annotated answers in nats; validation_*: the same on the validation records.

    Args:
      params, decode_params: the same parameters, laid out for scoring and for decoding.
      config: the run's config.
      check_stop: called now and then; may raise to end the evaluation.
    """
    settings = config.evaluation
    answers = Answers(settings.answer)
    result: dict[str, Any] = {"n": len(test)}

    def accuracy(records: Sequence[Record], temperature: float, copies: int, prefix: str) -> None:
        name = f"{prefix}{'sampled' if temperature else 'greedy'}_accuracy"
        with progress(f"evaluating: {name}", total=len(records) * copies, unit="responses") as bar:

            def advance(count: int) -> None:
                bar.advance(count)
                check_stop()

            samples = generate(
                model,
                decode_params,
                [record.prompt for record in records],
                seed=config.seed + _SEED_OFFSET,
                temperature=temperature,
                max_new_tokens=config.sampling.max_new_tokens,
                stop_ids=template.stop_ids,
                samples_per_prompt=copies,
                slots=settings.batch_size,
                mesh=mesh,
                on_progress=advance,
            )
        texts = [template.decode(tokens) for tokens in samples.tokens]
        targets = [record.target_text for record in records for _ in range(copies)]
        right = answers.correct(texts, targets) & samples.finished
        result[name], result[f"{name}_se"] = mean_and_error(right.reshape(len(records), copies).mean(axis=1))

    def likelihood(records: Sequence[Record], prefix: str) -> None:
        check_stop()
        prompts, targets = [r.prompt for r in records], [[r.target] for r in records]
        logps = score(model, params, prompts, targets, mesh=mesh, batch_size=settings.batch_size)[:, 0]
        name = f"{prefix}target_logp"
        result[name], result[f"{name}_se"] = mean_and_error(logps.astype(np.float64))
        result[f"{prefix}target_nll_per_token"] = -float(logps.sum()) / sum(len(r.target) for r in records)

    if test:
        if settings.greedy:
            accuracy(test, 0.0, 1, "")
        if settings.samples_per_prompt:
            accuracy(test, 1.0, settings.samples_per_prompt, "")
        likelihood(test, "")
    if validation:
        likelihood(validation, "validation_")
        if settings.select == "sampled_accuracy":
            accuracy(validation, 1.0, max(settings.samples_per_prompt, 1), "validation_")
    return result
