"""What would make a config fit, found by compiling: changes in a sensible order, those that change no number first."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from selfplay_jax.errors import UserError
from selfplay_jax.preflight.compile import FITS, LATE, TOO_LARGE, Compiler, Outcome
from selfplay_jax.preflight.topologies import Slice

Change = dict[str, Any]  # dotted config field -> value

SAME, NEARLY, OTHER = "same numbers", "other rounding", "another training"


@dataclasses.dataclass(frozen=True)
class Tried:
    """One change of the config and what compiling with it said. meaning: what it does to the numbers of a run."""

    change: Change
    meaning: str
    status: str
    outcomes: tuple[Outcome, ...]

    @property
    def flags(self) -> str:
        """The change as command-line flags."""
        return " ".join(f"--config.{name}={value}" for name, value in self.change.items())

    @property
    def total(self) -> float:
        """Bytes per device of the largest program, 0 where the compiler did not say."""
        return max((outcome.total or outcome.needed for outcome in self.outcomes), default=0.0)


def candidates(config: Any, shape: Any, wanted: Slice, failing: Sequence[str]) -> Iterator[tuple[Change, str]]:
    """Changes to try for the programs that do not fit, in order: alone first, then together.

    Same numbers: rematerialisation, microbatches, slots, the mesh. Then bfloat16 parameters, then LoRA.
    """
    train = bool({"train", "score"} & set(failing))
    sampling = bool({"fill", "decode"} & set(failing))
    together: Change = {}
    if "train" in failing and config.model.remat != "full":
        if config.model.remat == "none":
            yield {"model.remat": "dots"}, SAME
        together["model.remat"] = "full"
        yield dict(together), SAME
    if "train" in failing:
        data = max(wanted.devices // max(config.mesh.tensor, 1), 1)
        most = max(config.train.batch_size // data, 1)
        pieces = [n for n in (2, 4, 8, 16, 32, 64) if n <= most and config.train.batch_size % n == 0]
        pieces = [n for n in pieces if n > config.train.accumulate]
        for number in dict.fromkeys((*pieces[:1], *pieces[-1:])):
            yield together | {"train.accumulate": number}, SAME
        if pieces:
            together["train.accumulate"] = pieces[-1]
    if "score" in failing and config.scoring.batch_size > wanted.devices:
        together["scoring.batch_size"] = max(config.scoring.batch_size // 4, 1)
        yield {"scoring.batch_size": together["scoring.batch_size"]}, SAME
    if sampling:
        if config.sampling.slots >= 2:
            together["sampling.slots"] = max(config.sampling.slots // 4, 1)
            yield {"sampling.slots": max(config.sampling.slots // 2, 1)}, SAME
            yield {"sampling.slots": together["sampling.slots"]}, SAME
        if not config.sampling.sharded_weights:
            yield {"sampling.sharded_weights": True}, SAME
            yield together | {"sampling.sharded_weights": True}, SAME
    widths = [n for n in (2, 4, 8) if _divides(n, shape, wanted) and n > config.mesh.tensor]
    for tensor in widths:
        yield {"mesh.tensor": tensor}, SAME
    for tensor in widths[-1:]:
        if together:
            yield together | {"mesh.tensor": tensor}, SAME
    if config.model.param_dtype == "float32":
        yield {"model.param_dtype": "bfloat16"}, NEARLY
        if together:
            yield together | {"model.param_dtype": "bfloat16"}, NEARLY
        together["model.param_dtype"] = "bfloat16"
    if train and not config.lora.rank:
        yield {"lora.rank": 16}, OTHER
        if together:
            yield together | {"lora.rank": 16}, OTHER
    if widths and train and not config.lora.rank:
        yield together | {"lora.rank": 16, "mesh.tensor": widths[-1]}, OTHER


def _divides(tensor: int, shape: Any, wanted: Slice) -> bool:
    whole = wanted.devices // wanted.slices
    return not (whole % tensor or shape.num_heads % tensor or shape.intermediate_size % tensor)


def changed(config: Any, change: Change) -> Any:
    """A copy of the config with other values."""
    copy = config.copy_and_resolve_references()
    for name, value in change.items():
        section, field = name.split(".")
        copy[section][field] = value
    return copy


def advise(
    config: Any,
    shape: Any,
    wanted: Slice,
    outcomes: Sequence[Outcome],
    compiler: Compiler,
    *,
    seconds: float,
    enough: int = 3,
    on_try: Callable[[str], None] = lambda flags: None,
) -> list[Tried]:
    """Compiles changed configs until `enough` fit, the list is through or the time is up; everything tried is returned.

    A change that leaves a program with arguments that alone exceed the memory is refused by the compiler within
    seconds, so the list may be long. Only the programs that did not fit are compiled again; those that did are too when
    the change touches them (mesh, precision, LoRA).
    """
    failing = [outcome.program for outcome in outcomes if outcome.status(wanted) == TOO_LARGE]
    everything = [outcome.program for outcome in outcomes]
    tried: list[Tried] = []
    seen: list[Change] = []
    until = time.monotonic() + seconds
    for change, meaning in candidates(config, shape, wanted, failing):
        if change in seen or sum(one.status == FITS for one in tried) >= enough:
            continue
        if time.monotonic() >= until:
            tried.append(Tried(change, meaning, LATE, ()))
            break
        seen.append(change)
        one = Tried(change, meaning, "", ())
        on_try(one.flags)
        wide = {"mesh.tensor", "model.param_dtype", "lora.rank"} & set(change)
        try:
            results = compiler(changed(config, change), everything if wide else failing, until - time.monotonic())
            bad = [result.status(wanted) for result in results if result.status(wanted) != FITS]
            status = bad[0] if bad else FITS
        except UserError as error:
            results, status = [], str(error)
        tried.append(dataclasses.replace(one, status=status, outcomes=tuple(results)))
    return tried
