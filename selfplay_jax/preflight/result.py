"""The result of a preflight on one slice, and its form in JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from selfplay_jax.preflight.advise import Tried
from selfplay_jax.preflight.compile import FITS, TOO_LARGE, Outcome
from selfplay_jax.preflight.speed import Phase, speed
from selfplay_jax.preflight.topologies import GIB, Slice


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What hours per round rest on. prompts: None where nobody said how many there are."""

    prompts: int | None
    response_tokens: float
    efficiency: float


@dataclasses.dataclass(frozen=True)
class Result:
    """One slice. refused: why nothing was compiled, "" where something was."""

    slice: Slice
    outcomes: Sequence[Outcome] = ()
    phases: Sequence[Phase] = ()
    advice: Sequence[Tried] = ()
    refused: str = ""

    @property
    def status(self) -> str:
        """FITS, TOO_LARGE or the first other problem."""
        found = [outcome.status(self.slice) for outcome in self.outcomes]
        if self.refused or TOO_LARGE in found:
            return self.refused or TOO_LARGE
        return next((status for status in found if status != FITS), FITS)

    @property
    def hours(self) -> float | None:
        """Hours of a round, None where they are not known."""
        return sum(phase.seconds for phase in self.phases) / 3600 if self.phases else None

    @property
    def mesh(self) -> dict[str, int]:
        """The sizes of the run's mesh; {} where only programs of a host's own were compiled."""
        return next((outcome.mesh for outcome in self.outcomes if outcome.copies == 1), {})

    def largest(self) -> Outcome | None:
        """The program that takes the most memory."""
        return max(self.outcomes, key=lambda outcome: outcome.total or outcome.needed, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values: sizes in GiB per device, times in seconds."""
        return {
            "slice": self.slice.name,
            "topology": self.slice.topology,
            "slices": self.slice.slices,
            "chips": self.slice.chips,
            "devices": self.slice.devices,
            "hosts": self.slice.hosts,
            "hbm_gib": self.slice.chip.hbm_bytes / GIB,
            "status": self.status,
            "fits": self.status == FITS,
            "mesh": self.mesh,
            "programs": [_program(outcome, self.slice) for outcome in self.outcomes],
            "round": {
                "hours": self.hours,
                "phases": [dataclasses.asdict(phase) for phase in self.phases],
            },
            "advice": [
                {"flags": tried.flags, "numbers": tried.meaning, "status": tried.status, "gib": tried.total / GIB}
                for tried in self.advice
            ],
        }


def parts(outcome: Outcome) -> dict[str, float]:
    """Bytes per device by what they are; "other" is padding, outputs and the program's own code."""
    found = {name: outcome.holds.get(name, 0.0) for name in ("parameters", "optimizer", "cache")}
    found["batch"] = outcome.holds.get("batch", 0.0) + outcome.holds.get("slots", 0.0)
    found["frozen base"] = outcome.holds.get("frozen base", 0.0)
    if outcome.memory:
        found["temporaries"] = outcome.memory["temporaries"]
        found["other"] = (
            max(outcome.memory["arguments"] - sum(outcome.holds.values()), 0.0)
            + outcome.memory["outputs"]
            + outcome.memory["program"]
        )
    found["beside"] = sum(outcome.beside.values())
    return found


def tokens_per_second(outcome: Outcome, wanted: Slice) -> float | None:
    """Token positions per second and chip, with communication in turn with computation."""
    took = speed(outcome, wanted)
    return outcome.tokens * outcome.copies / took.in_turn / wanted.chips if took and took.in_turn else None


def _program(outcome: Outcome, wanted: Slice) -> dict[str, Any]:
    took = speed(outcome, wanted)
    status = outcome.status(wanted)
    return {
        "name": outcome.program,
        "status": status,
        "message": outcome.message if status != FITS else "",
        "gib": {name: size / GIB for name, size in parts(outcome).items()},
        "total_gib": outcome.total / GIB,
        "needed_gib": outcome.needed / GIB,
        "headroom_gib": (wanted.chip.hbm_bytes - outcome.total) / GIB if outcome.total else None,
        "mesh": outcome.mesh,
        "copies": outcome.copies,
        "rows": outcome.rows,
        "tokens": outcome.tokens,
        "model_flops": outcome.model_flops,
        "hardware_flops": outcome.flops,
        "compile_seconds": outcome.seconds,
        "ici_bytes": [traffic.ici_bytes if traffic else None for traffic in (outcome.once, outcome.repeated)],
        "dcn_bytes": [traffic.dcn_bytes if traffic else None for traffic in (outcome.once, outcome.repeated)],
        "collectives": [traffic.collectives if traffic else None for traffic in (outcome.once, outcome.repeated)],
        "seconds": dataclasses.asdict(took) if took else None,
        "tokens_per_second_per_chip": tokens_per_second(outcome, wanted),
    }
