"""Sampling by several processes: each answers its share of the prompts, and all get all the answers."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from selfplay_jax import distributed
from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.sampling.generate import Samples, generate


def generate_shared(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    mesh: Mesh | None,
    max_new_tokens: int,
    prompt_ids: Sequence[int] | None = None,
    samples_per_prompt: int = 1,
    max_prompt_tokens: int | None = None,
    on_progress: Callable[[int], None] | None = None,
    **settings: Any,
) -> Samples:
    """`generate`, by all processes: on a `distributed.local_mesh` each samples some of the prompts.

    All must come here with the same arguments but `params` and `mesh`; all return all samples, the same as one process
    alone would draw. `on_progress` counts as though the others were as far.
    """
    count = distributed.count()
    told = 0

    def advance(done: int) -> None:
        nonlocal told
        assert on_progress is not None
        done = min(done * count, len(prompts) * samples_per_prompt - told)
        told += done
        on_progress(done)

    if not distributed.is_local(mesh) or not prompts:
        return generate(
            model, params, prompts, mesh=mesh, max_new_tokens=max_new_tokens, prompt_ids=prompt_ids,
            samples_per_prompt=samples_per_prompt, max_prompt_tokens=max_prompt_tokens, on_progress=on_progress,
            **settings,
        )  # fmt: skip
    ids = range(len(prompts)) if prompt_ids is None else prompt_ids
    ours = distributed.mine(list(range(len(prompts))))
    own = distributed.each(
        lambda: generate(
            model,
            params,
            [prompts[i] for i in ours],
            mesh=mesh,
            max_new_tokens=max_new_tokens,
            prompt_ids=[ids[i] for i in ours],
            samples_per_prompt=samples_per_prompt,
            max_prompt_tokens=max_prompt_tokens or max(map(len, prompts)),
            on_progress=None if on_progress is None else advance,
            **settings,
        )
    )
    # Prompt i lies with process i mod n, so row r of process p is prompt r·n + p.
    rows = -(-len(prompts) // count)
    everyone = multihost_utils.process_allgather(_padded(own, rows * samples_per_prompt, max_new_tokens))

    def ordered(array: np.ndarray) -> np.ndarray:
        by_prompt = np.swapaxes(array.reshape(count, rows, samples_per_prompt, *array.shape[2:]), 0, 1)
        return by_prompt.reshape(-1, *array.shape[2:])[: len(prompts) * samples_per_prompt]

    tokens, lengths, finished, logps = (ordered(array) for array in everyone)
    lists = [row[:length].tolist() for row, length in zip(tokens, lengths.tolist(), strict=True)]
    return Samples(lists, lengths, finished, logps)


def _padded(samples: Samples, rows: int, width: int) -> tuple[np.ndarray, ...]:
    """Samples as arrays of the same shapes on every process: tokens [rows, width], lengths, finished, logps."""
    tokens = np.zeros((rows, width), np.int32)
    for row, ids in zip(tokens, samples.tokens, strict=False):
        row[: len(ids)] = ids
    short = rows - len(samples.tokens)
    rest = (np.pad(array, (0, short)) for array in (samples.lengths, samples.finished, samples.logps))
    return tokens, *rest
