"""The listed evaluations of a checkpoint, against log-probabilities in NumPy float64."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import PLAIN, loud_params, mesh_of, random_rows
from tiny_models import reference_token_logps as reference

from selfplay_jax.config import base
from selfplay_jax.data.tokens import Record
from selfplay_jax.errors import UserError
from selfplay_jax.evaluation import Subject, evaluate, parse
from selfplay_jax.models import Model
from selfplay_jax.sampling import generate


def test_parse():
    assert parse("greedy:200, likelihood,lm_eval/arc_easy:10,lm_eval/x") == [
        ("greedy", 200), ("likelihood", 0), ("lm_eval/arc_easy", 10), ("lm_eval/x", 0),
    ]  # fmt: skip
    assert parse("") == []
    for text, says in (
        ("greedi", "has 'greedi', which is no evaluation; did you mean 'greedy'"),
        ("zzz", "there are greedy, sampled, likelihood, wins.* and lm_eval/TASK"),
        ("greedy:many", "'greedy:many': after the colon stands a number"),
        ("greedy:0", "number of examples"),
    ):
        with pytest.raises(UserError, match=rf"config\.evaluation\.run .*{says}"):
            parse(text)


class Words:
    """Decodes a token id as its number, so that "#7" is an answer."""

    stop_ids = (3,)

    def decode(self, ids):
        return " ".join(f"#{i}" for i in ids if i != 3)


@pytest.fixture(scope="module")
def made():
    """A subject over random records, its records, and both parameter trees."""
    rng = np.random.default_rng(5)
    model, mesh = Model(PLAIN), mesh_of(8, 1)
    params, start = loud_params(model, 0), loud_params(model, 1)
    prompts, targets = random_rows(rng, [4] * 9), random_rows(rng, rng.integers(2, 7, 9).tolist())
    records = [
        Record(i, p, z, None, "", Words().decode(z)) for i, (p, z) in enumerate(zip(prompts, targets, strict=True))
    ]
    config = base()
    config.sampling.max_new_tokens = 6
    config.evaluation.update(batch_size=8, samples_per_prompt=2, run="greedy,sampled:5,likelihood,wins")
    shardings = model.shardings(mesh)
    here = jax.device_put(params, shardings)
    subject = Subject(
        model, here, model, here, lambda: jax.device_put(start, shardings), Words(), mesh, config, records
    )
    return subject, records, params, start


def test_numbers_are_numpy_s(made):
    subject, records, params, start = made
    result = evaluate(subject, records, records[:3])

    def logp(weights, record, tokens):
        return reference(PLAIN, weights, record.prompt, tokens).sum()

    targets = np.array([logp(params, r, r.target) for r in records])
    np.testing.assert_allclose(result["target_logp"], targets.mean(), rtol=1e-4)
    np.testing.assert_allclose(result["target_logp_se"], targets.std(ddof=1) / 3, rtol=1e-3)
    tokens = sum(len(r.target) for r in records)
    np.testing.assert_allclose(result["target_nll_per_token"], -targets.sum() / tokens, rtol=1e-4)
    np.testing.assert_allclose(result["validation_target_logp"], targets[:3].mean(), rtol=1e-4)
    assert "validation_sampled_accuracy" not in result

    samples = generate(
        subject.decode_model, subject.decode_params, [r.prompt for r in records], seed=1_000_003, max_new_tokens=6,
        stop_ids=(3,), slots=8, mesh=subject.mesh,
    ).tokens  # fmt: skip
    own = np.array([logp(params, r, z) for r, z in zip(records, samples, strict=True)])
    before = np.array([logp(start, r, r.target) - logp(start, r, z) for r, z in zip(records, samples, strict=True)])
    likelier, rewarded = targets > own, targets - own > before
    assert result["wins_n"] == 9
    for name, wins in (("logp", likelier), ("reward", rewarded), ("reward_only", rewarded & ~likelier)):
        np.testing.assert_allclose(result[f"wins_{name}"], wins.mean(), rtol=1e-6)
        np.testing.assert_allclose(result[f"wins_{name}_se"], wins.std(ddof=1) / 3, rtol=1e-6)


def test_theta_0_has_no_reward_and_own_answers_do_not_count(made):
    subject, records, _, _ = made
    config = subject.config.copy_and_resolve_references()
    config.evaluation.run = "wins:4"
    first = dataclasses.replace(subject, start=None, config=config)
    result = evaluate(first, records, [])
    assert result["wins_n"] == 4 and "wins_logp" in result and "wins_reward" not in result
    samples = generate(
        first.decode_model, first.decode_params, [r.prompt for r in records[:4]], seed=1_000_003, max_new_tokens=6,
        stop_ids=(3,), slots=8, mesh=first.mesh,
    ).tokens  # fmt: skip
    same = [dataclasses.replace(r, target=z) for r, z in zip(records, samples, strict=False)]
    assert evaluate(first, same, [])["wins_n"] == 0


def test_a_number_takes_the_first_so_many(made):
    subject, records, _, _ = made
    config = subject.config.copy_and_resolve_references()
    config.evaluation.run = "likelihood:2"
    two = evaluate(dataclasses.replace(subject, config=config), records, [])
    config.evaluation.run = "likelihood"
    also = evaluate(dataclasses.replace(subject, config=config), records[:2], [])
    assert two["target_logp"] == also["target_logp"] and two["n"] == 9
