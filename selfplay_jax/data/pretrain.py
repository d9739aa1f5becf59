"""Pretrains the built-in task's base model from scratch: `python -m selfplay_jax.data.builtin --pretrain`.

An ordinary language model of about 100,000 parameters, trained on the responses of `builtin.corpus`. It is
fixed by its seed: the same machine and library versions write the same file. The settings below made the base
that ships.
"""

import functools
import json
import pathlib
import re
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from selfplay_jax.data import builtin
from selfplay_jax.groups import Group, pad_rows
from selfplay_jax.logprobs import response_logps
from selfplay_jax.models import Model, ModelConfig, save_hf
from selfplay_jax.models.decoder import Params

STEPS, BATCH, LEARNING_RATE, WARM_UP = 2000, 128, 4e-3, 100
# The skill comes first: this share of the steps sees mostly clean answers, with so little of the mixture in them.
SKILL_SHARE, SKILL_MIXED = 0.6, 0.1
_PROMPT_WIDTH, _RESPONSE_WIDTH = builtin.PROMPT_LIMIT, builtin.RESPONSE_LIMIT
_EVALUATION, _REPORTS = 200, 8  # validation problems per report, reports per run


def base_config() -> ModelConfig:
    """The shape of the base: a Llama of two layers whose output is tied to its embedding."""
    vocabulary = (*builtin.SPECIALS, *builtin.CHARACTERS)
    return ModelConfig(
        family="llama",
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=168,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=32,
        tie_embeddings=True,
        max_position_embeddings=64,
        stop_ids=(vocabulary.index(builtin.EOS),),
        pad_id=vocabulary.index(builtin.PAD),
    )


def pretrain(directory: pathlib.Path, *, seed: int, steps: int = STEPS) -> None:
    """Trains a base on `steps` batches of fresh pairs and writes it to `directory` in Hugging Face's format.

    Prints the loss and the accuracy of sampled answers to validation problems now and then.
    """
    model = Model(base_config())
    params = _initial(model, seed)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, LEARNING_RATE, min(WARM_UP, steps), steps + 1, LEARNING_RATE / 50
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))
    state = optimizer.init(params)
    step = jax.jit(functools.partial(_step, model, optimizer), donate_argnums=(0, 1))
    began, every, losses = time.monotonic(), max(1, steps // _REPORTS), []
    print(
        f"pretraining {sum(x.size for x in jax.tree.leaves(params)):,} parameters for {steps} steps",
        flush=True,
    )
    for i in range(steps):
        params, state, loss = step(params, state, _batch(seed, i, 1.0 if i >= SKILL_SHARE * steps else SKILL_MIXED))
        losses.append(loss)
        if (i + 1) % every == 0 or i + 1 == steps:
            seconds, recent = time.monotonic() - began, float(np.mean(losses[-every:]))
            accuracy = sampled_accuracy(model, params, seed=seed)
            print(
                f"step {i + 1}: loss {recent:.3f}, sampled accuracy {accuracy:.3f}, {seconds:.0f} s",
                flush=True,
            )
    with tempfile.TemporaryDirectory() as source:
        _write_source(pathlib.Path(source), seed=seed, steps=steps)
        save_hf(directory, model, params, source=source)
    print(f"wrote {directory}", flush=True)


def _initial(model: Model, seed: int) -> Params:
    """`Model.init` with every matrix at 1 / sqrt(inputs): its 0.02 suits wide models and starts a narrow one slowly."""
    params, config = model.init(jax.random.key(seed)), model.config
    wide = config.hidden_size**-0.5 / 0.02
    depth = (2 * config.num_layers) ** -0.5  # two additions to the residual stream per layer
    factors = dict.fromkeys(("q", "k", "v", "gate", "up"), wide)
    factors |= {"o": wide * depth, "down": config.intermediate_size**-0.5 / 0.02 * depth}
    layers = {name: {"kernel": params["layers"][name]["kernel"] * by} for name, by in factors.items()}
    embedding = params["embed"]["embedding"] * wide
    return params | {"embed": {"embedding": embedding}, "layers": params["layers"] | layers}


def _step(model: Model, optimizer: Any, params: Params, state: Any, group: Group) -> tuple[Params, Any, jax.Array]:
    def loss(params: Params) -> jax.Array:
        return -jnp.sum(response_logps(model, params, group)) / jnp.sum(group.response_lengths)

    value, gradient = jax.value_and_grad(loss)(params)
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state, value


def ids(text: str) -> list[int]:
    return [len(builtin.SPECIALS) + builtin.CHARACTERS.index(character) for character in text]


def _batch(seed: int, index: int, mixed: float) -> Group:
    pairs = builtin.corpus(BATCH, seed=seed * 1_000_000 + index, mixed=mixed)
    end = builtin.SPECIALS.index(builtin.EOS)
    prompt, prompt_lengths = pad_rows([ids(p) for p, _ in pairs], _PROMPT_WIDTH)
    response, lengths = pad_rows([[*ids(r), end] for _, r in pairs], _RESPONSE_WIDTH)
    return Group(prompt, prompt_lengths, response[:, None], lengths[:, None])


def sampled_accuracy(model: Model, params: Params, *, seed: int) -> float:
    """The share of validation problems that one sample at temperature 1 answers rightly."""
    problems = builtin.examples("validation", _EVALUATION, seed)
    prompts = np.array([ids(example.messages[0]["content"]) for example in problems], np.int32)
    rows = np.asarray(_sample(model, params, prompts, jax.random.key(seed)))
    characters = ["" for _ in builtin.SPECIALS] + list(builtin.CHARACTERS)
    right = 0
    for example, row in zip(problems, rows, strict=True):
        ended = np.flatnonzero(row == builtin.SPECIALS.index(builtin.EOS))
        text = "".join(characters[token] for token in row[: ended[0] if ended.size else None])
        given = re.search(r"#(-?\d+)", text)
        right += given is not None and given[1] == example.response.split("#")[1]
    return right / len(problems)


@functools.partial(jax.jit, static_argnums=0)
def _sample(model: Model, params: Params, prompts: jax.Array, key: jax.Array) -> jax.Array:
    """Responses [B, RESPONSE_LIMIT] to prompts [B, P] of one length; no cache: the rows are few and short."""
    batch, start = prompts.shape
    tokens = jnp.pad(prompts, ((0, 0), (0, _RESPONSE_WIDTH)))
    lengths = jnp.full((batch,), tokens.shape[1], jnp.int32)

    def step(tokens: jax.Array, at: jax.Array) -> tuple[jax.Array, None]:
        logits = model.logits(params, tokens, lengths)
        here = jax.lax.dynamic_index_in_dim(logits, at - 1, axis=1, keepdims=False)
        drawn = jax.random.categorical(jax.random.fold_in(key, at), here).astype(jnp.int32)
        return jax.lax.dynamic_update_index_in_dim(tokens, drawn, at, axis=1), None

    tokens, _ = jax.lax.scan(step, tokens, jnp.arange(start, start + _RESPONSE_WIDTH))
    return tokens[:, start:]


def _write_source(directory: pathlib.Path, *, seed: int, steps: int) -> None:
    """What `save_hf` copies into the export: the tokenizer, and in config.json how the base was made."""
    builtin.save_tokenizer(directory)
    made = {"script": "python -m selfplay_jax.data.builtin --pretrain", "seed": seed, "steps": steps}
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "pretraining": made}))
