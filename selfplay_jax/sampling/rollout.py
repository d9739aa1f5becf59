"""The responses of one round: sampled in chunks, each saved as it is done, joined at the end."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from selfplay_jax import distributed
from selfplay_jax.data.templates import Template
from selfplay_jax.data.tokens import Record
from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.progress import progress
from selfplay_jax.rounds import Responses, RoundFiles, chunks, gaps
from selfplay_jax.sampling.generate import Samples, generate


def rollout(
    model: Model,
    params: Params,
    records: Sequence[Record],
    files: RoundFiles,
    template: Template,
    settings: Any,
    *,
    samples_per_prompt: int,
    seed: int,
    mesh: Mesh,
    check_stop: Callable[[], None] = lambda: None,
) -> Responses:
    """S responses of θ_t to every record, read from disk where they lie there already.

    `settings` are the config's `sampling` fields. Each part of the prompts is sampled by itself, and no response
    depends on its part: a killed rollout goes on with what is not saved, in parts of whatever size, and ends with the
    same responses. Of several processes each samples its share of the parts where `mesh` is its own. `check_stop` is
    called now and then and may raise.
    """
    ids = [record.id for record in records]
    if distributed.agree(lambda: files.responses_path().exists()):
        return files.load_responses(ids)
    there = [slice(*ends) for ends in distributed.agree(lambda: [[part.start, part.stop] for part in files.parts()])]
    split = distributed.is_local(mesh)  # else all processes sample every part together
    left = cut(gaps(len(records), there), settings.chunk, distributed.count() if split else 1)
    longest = max(len(record.prompt) for record in records)

    def sample(rows: slice, on_progress: Callable[[int], None]) -> Samples:
        return generate(
            model,
            params,
            [record.prompt for record in records[rows]],
            seed=seed,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=template.stop_ids,
            prompt_ids=ids[rows],
            samples_per_prompt=samples_per_prompt,
            round_index=files.round_index,
            slots=settings.slots,
            max_prompt_tokens=longest,
            mesh=mesh,
            on_progress=on_progress,
        )

    def sample_and_save(ours: list[slice], ready: int) -> None:
        def advance(count: int) -> None:
            bar.advance(count)
            check_stop()

        total = ready + _prompts(ours) * samples_per_prompt
        with progress(f"sampling round {files.round_index}", total=total, unit="responses", start=ready) as bar:
            for part in ours:
                samples = sample(part, advance)
                if split or distributed.is_lead():
                    _save(files, part, records[part], samples, template)

    if split:
        distributed.each(lambda: sample_and_save(distributed.mine(left), 0))
    else:
        sample_and_save(left, (len(records) - _prompts(left)) * samples_per_prompt)
    files.join_parts(sorted(there + left, key=lambda part: part.start))
    return files.load_responses(ids)


def cut(rows: Sequence[slice], most: int, processes: int) -> list[slice]:
    """Rows in parts of at most `most`, small enough to give each process an equal share."""
    share = -(-_prompts(rows) // processes)
    size = -(-share // -(-share // most)) if share else most
    return [slice(s.start + i.start, s.start + i.stop) for s in rows for _, i in chunks(s.stop - s.start, size)]


def _prompts(parts: Sequence[slice]) -> int:
    return sum(part.stop - part.start for part in parts)


def _save(files: RoundFiles, part: slice, records: Sequence[Record], samples: Samples, template: Template) -> None:
    shape = (len(records), len(samples.tokens) // len(records))
    grouped = [samples.tokens[i : i + shape[1]] for i in range(0, len(samples.tokens), shape[1])]
    responses = Responses(grouped, samples.finished.reshape(shape), samples.logps.reshape(shape))
    files.save_responses(responses, records, [template.decode(tokens) for tokens in samples.tokens], part)


def describe(responses: Responses, records: Sequence[Record]) -> dict[str, Any]:
    """Lengths of targets and responses in tokens (means), the share that ended by themselves, and how many there are.

    Summed log-probabilities favour short, cut responses, so a run whose lengths drift apart shows it here.
    """
    return {
        "target_length": float(np.mean([len(record.target) for record in records])),
        "generated_length": float(np.mean(responses.lengths)),
        "finished_share": float(np.mean(responses.finished)),
        "same_as_target_share": float(
            np.mean([z == r.target for r, row in zip(records, responses.tokens, strict=True) for z in row])
        ),
        "count": int(responses.finished.size),
    }
