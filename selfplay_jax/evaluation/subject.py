"""What evaluations evaluate: a checkpoint with its sampler, its scorer and the run's settings."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from selfplay_jax.data.templates import Template
from selfplay_jax.data.tokens import Record
from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.progress import progress
from selfplay_jax.sampling import Samples
from selfplay_jax.sampling.shared import generate_shared
from selfplay_jax.scoring import score

# Evaluation draws from streams of its own, the same ones for every checkpoint, so that checkpoints are compared on
# common random numbers.
_SEED_OFFSET = 1_000_003

Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A checkpoint as the evaluations see it.

    params are laid out for scoring; decode_model and decode_params compute the same, laid out for decoding (and with
    LoRA's adapters merged) on decode_mesh, by default `mesh`: of several processes each may have its own. start() gives
    the parameters of θ_0, None for θ_0 itself. train: records to take worked examples from.
    """

    model: Model
    params: Params
    decode_model: Model
    decode_params: Params
    start: Callable[[], Params] | None
    template: Template
    mesh: Mesh
    config: Any
    train: Sequence[Record]
    check_stop: Callable[[], None] = lambda: None
    decode_mesh: Mesh | None = None

    def generate(self, title: str, prompts: Sequence[Sequence[int]], temperature: float, copies: int) -> Samples:
        """`copies` answers to each prompt, with the run's settings."""
        with progress(f"evaluating: {title}", total=len(prompts) * copies, unit="responses") as bar:

            def advance(count: int) -> None:
                bar.advance(count)
                self.check_stop()

            return generate_shared(
                self.decode_model,
                self.decode_params,
                prompts,
                seed=self.config.seed + _SEED_OFFSET,
                temperature=temperature,
                max_new_tokens=self.config.sampling.max_new_tokens,
                stop_ids=self.template.stop_ids,
                samples_per_prompt=copies,
                slots=self.config.evaluation.batch_size,
                mesh=self.decode_mesh or self.mesh,
                on_progress=advance,
            )

    def score(self, params: Params, records: Sequence[Record], columns: Sequence[Any]) -> np.ndarray:
        """log π of K responses to each record's prompt under `params`, float32 [N, K]."""
        self.check_stop()
        prompts, size = [record.prompt for record in records], self.config.evaluation.batch_size
        return score(self.model, params, prompts, columns, mesh=self.mesh, batch_size=size)
