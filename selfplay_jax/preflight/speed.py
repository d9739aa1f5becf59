"""From what the compiler says of the programs to seconds, model-flops utilisation and hours per round."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from selfplay_jax.preflight import programs
from selfplay_jax.preflight.compile import Outcome
from selfplay_jax.preflight.topologies import Slice


@dataclasses.dataclass(frozen=True)
class Speed:
    """One run of a program (one token of every slot for decoding), in seconds per device.

    compute: the compiler's estimated cycles / clock, with Pallas kernels at the peak rate; without estimates all matrix
    products at the peak rate. ici, dcn: bytes sent / bandwidth. hidden, in_turn: the longest of the three, and their
    sum. mfu_hidden, mfu_in_turn: model flops / peak flops of that time.
    """

    compute: float
    ici: float
    dcn: float
    hidden: float
    in_turn: float
    mfu_hidden: float
    mfu_in_turn: float
    estimated: bool


def speed(outcome: Outcome, wanted: Slice) -> Speed | None:
    """The speed of a compiled program; None where it was not compiled."""
    if not outcome.memory:
        return None
    chip = wanted.chip
    peak = chip.peak_flops * wanted.devices / outcome.copies
    traffic = outcome.once
    if outcome.once is not None and outcome.repeated is not None:
        # Decoding is all in its loop: what stands before it happens once per refill, not once per token.
        decoding = outcome.program == "decode" and outcome.repeated.cycles
        traffic = outcome.repeated if decoding else outcome.once + outcome.repeated
    if traffic is None or not traffic.cycles:
        compute = outcome.flops / peak
    else:
        compute = traffic.cycles / chip.clock + outcome.pallas_flops / peak
    ici = traffic.ici_bytes / chip.ici_bandwidth if traffic else 0.0
    dcn = traffic.dcn_bytes / chip.dcn_bandwidth if traffic else 0.0
    hidden, in_turn = max(compute, ici, dcn), compute + ici + dcn
    at_peak = outcome.model_flops / peak
    return Speed(
        compute, ici, dcn, hidden, in_turn,
        at_peak / hidden if hidden else 0.0,
        at_peak / in_turn if in_turn else 0.0,
        traffic is not None and bool(traffic.cycles),
    )  # fmt: skip


# Prompts of sources that presets name, where the config itself does not say how many: published sizes.
_EXAMPLES = {"openai/gsm8k:main": 7473}


def prompts(config: Any, said: int | None) -> int | None:
    """Prompts of a round: what --examples said, else what the config or the source's published size says."""
    if said is not None:
        return said
    if config.data.examples:  # those of training: what is held back comes on top
        return config.data.examples
    if config.data.source == "builtin":
        return 100
    left = _EXAMPLES.get(config.data.source, 0) - config.data.validation_examples
    return left if left > 0 else None


@dataclasses.dataclass(frozen=True)
class Phase:
    """How often a program runs in a round, and what that takes."""

    name: str
    program: str
    runs: float
    seconds: float


def phases(
    config: Any, outcomes: Sequence[Outcome], wanted: Slice, *, count: int, mean_response: float, efficiency: float
) -> list[Phase]:
    """A steady round's phases, with communication in turn with computation, at `efficiency` of that speed.

    mean_response: tokens that a sampled response has on average. Programs that were not compiled are left out.
    """
    compiled = {outcome.program: outcome for outcome in outcomes}
    rows = {name: max(outcome.rows * outcome.copies, 1) for name, outcome in compiled.items()}
    responses = count * config.samples_per_prompt
    runs: dict[str, tuple[str, float]] = {}
    if "fill" in rows:
        runs["fill"] = "sampling: prompts", math.ceil(responses / rows["fill"])
    if "decode" in rows:
        runs["decode"] = "sampling: tokens", responses * mean_response / rows["decode"]
    if "score" in rows:
        runs["score"] = "scoring", _score_runs(programs.sizes(config)) * math.ceil(count / rows["score"])
    if "train" in rows:
        runs["train"] = "training", config.train.epochs * math.ceil(count / config.train.batch_size)
    result = []
    for program, (name, number) in runs.items():
        took = speed(compiled[program], wanted)
        if took is not None:
            result.append(Phase(name, program, number, number * took.in_turn / efficiency))
    return result


def _score_runs(of: programs.Sizes) -> float:
    """The round's passes in runs of the compiled program: fewer columns cost less, by their token positions."""
    whole = of.prompt + of.score_columns * of.response
    return sum(
        (math.ceil(columns / of.score_columns) * of.prompt + columns * of.response) / whole for _, columns in of.passes
    )
