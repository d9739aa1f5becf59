"""Texts that a model writes after prompts, cut at stop strings as benchmarks ask for."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.sharding import Mesh

from selfplay_jax.models.decoder import Model, Params
from selfplay_jax.sampling.shared import generate_shared

# How far back `stop_when` reads, in tokens beside the stop string's: more than come between two of the sampler's looks.
_RECENT = 32


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings; empty ones do not count."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def generate_texts(
    model: Model,
    params: Params,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    until: Sequence[str] = (),
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    slots: int = 64,
    mesh: Mesh | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> list[str]:
    """What the model writes after each prompt, without special tokens, cut at the first stop string.

    A response ends at one of the model's stop tokens, the tokenizer's end token, a stop string or `max_new_tokens`.

    Args:
      prompts: lists of token ids.
      until: stop strings; a special token's name is one too (the text itself comes without special tokens).
      temperature, top_k, top_p, seed, slots, mesh, on_progress: see `generate_shared`; greedy by default.
    """
    stops = [stop for stop in until if stop]
    # A stop string is spelled by one token a byte at most.
    recent = _RECENT + max((len(stop.encode()) for stop in stops), default=0)

    def stop_when(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens[-recent:], skip_special_tokens=False)
        return any(stop in text for stop in stops)

    ends = {*model.config.stop_ids, tokenizer.eos_token_id} - {None}
    samples = generate_shared(
        model,
        params,
        prompts,
        seed=seed,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        max_new_tokens=max_new_tokens,
        stop_ids=sorted(ends),
        slots=slots,
        mesh=mesh,
        on_progress=on_progress,
        stop_when=stop_when if stops else None,
    )
    return [cut(tokenizer.decode(tokens, skip_special_tokens=True), stops) for tokens in samples.tokens]
