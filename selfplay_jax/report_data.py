"""What a run left in its workdir, read for the report, and how its numbers are written for people."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from selfplay_jax import metrics, stores
from selfplay_jax.errors import UserError

PHASES = ("sample", "score", "train", "evaluate", "save")
SCORES = (
    ("sampled_accuracy", "sampled"),
    ("greedy_accuracy", "greedy"),
)  # the first one present ranks checkpoints


@dataclasses.dataclass(frozen=True)
class Round:
    """A round, or the SFT warm-up with index -1; `summary` is empty while it has not ended."""

    index: int
    summary: dict[str, Any]
    rows: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return "SFT" if self.index < 0 else f"round {self.index}"

    @property
    def theta(self) -> int:
        """The index of the checkpoint this round made."""
        theta = number(self.summary, "eval", "theta")
        return self.index + 1 if theta is None else int(theta)

    def seconds(self) -> dict[str, float]:
        return seconds_by_phase(self.summary)


@dataclasses.dataclass(frozen=True)
class Run:
    """A workdir: its config and its rounds in order, the SFT warm-up first, unfinished ones included."""

    path: epath.Path
    config: dict[str, Any]
    rounds: list[Round]

    @property
    def name(self) -> str:
        return self.path.name or str(self.path)

    @property
    def method(self) -> str:
        return self._told("method")

    @property
    def preset(self) -> str:
        return self._told("preset")

    @property
    def finished(self) -> list[Round]:
        return [round_ for round_ in self.rounds if round_.summary]

    @property
    def evaluated(self) -> list[Round]:
        """The finished rounds whose checkpoint was evaluated."""
        return [round_ for round_ in self.finished if isinstance(round_.summary.get("eval"), Mapping)]

    def seconds(self) -> float:
        return sum(sum(round_.seconds().values()) for round_ in self.finished)

    def _told(self, key: str) -> str:
        for source in (self.config, *(round_.summary for round_ in reversed(self.finished))):
            if source.get(key) is not None:
                return str(source[key])
        return "–"


def load(workdir: epath.PathLike) -> Run:
    """Reads a workdir as it stands, also while the run goes on.

    Raises:
      UserError: there is no such directory, it is not a run's, or one of its files is damaged.
    """
    path = stores.open_path(workdir)
    if not path.is_dir():
        raise UserError(f"no run directory {path}: give the --workdir of a run")
    if not any((path / name).exists() for name in ("config.json", "sft", "rounds")):
        raise UserError(f"{path} is not a run directory (no config.json, no rounds): give the --workdir of a run")
    config = metrics.read_json(path / "config.json") if (path / "config.json").exists() else {}
    folders = [(-1, path / "sft")]
    if (path / "rounds").is_dir():
        children = [child for child in (path / "rounds").iterdir() if child.name.isdecimal()]
        folders += sorted((int(child.name), child) for child in children)
    rounds = []
    for index, folder in folders:
        file = folder / "summary.json"
        summary = metrics.read_json(file) if file.exists() else {}
        rows = metrics.read(folder / "metrics.jsonl")
        if summary or rows:
            rounds.append(Round(index, summary, rows))
    return Run(path.resolve() if "://" not in str(workdir) else path, config, rounds)


def number(tree: Mapping[str, Any], *keys: str) -> float | None:
    """The number at `keys`, or None where any part of the way is missing or it is no number."""
    value: Any = tree
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def seconds_by_phase(summary: Mapping[str, Any]) -> dict[str, float]:
    """A round's seconds per phase, the usual phases first."""
    named = summary.get("seconds")
    named = named if isinstance(named, Mapping) else {}
    values = {name: number(named, name) for name in in_order(named)}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def in_order(phases: Iterable[Any]) -> list[str]:
    """Names of phases without repetition, in the order in which a round goes through them."""
    names = dict.fromkeys(str(phase) for phase in phases)
    return [name for name in PHASES if name in names] + [name for name in names if name not in PHASES]


def betas(summary: Mapping[str, Any]) -> Iterator[tuple[int, float]]:
    """Pairs of a player's checkpoint index and its mean weight β."""
    index = summary.get("round", 0)
    players = summary.get("players")
    for j in range(len(players) if isinstance(players, list) else 64):
        value = number(summary, "train", f"beta_{j}")
        if value is not None:
            yield (players[j] if isinstance(players, list) else index - j), value


def short(value: float | None, *, sign: bool = False, digits: int = 3) -> str:
    """A number with `digits` significant digits; "–" where there is none."""
    if value is None:
        return "–"
    if value != 0 and math.isfinite(value) and 0.001 <= abs(value) < 1000:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:{'+' if sign else ''}.{min(decimals, digits)}f}"
    return f"{value:{'+' if sign else ''}.{digits}g}"


def percent(value: float | None, error: float | None = None) -> str:
    """A share as "72.9 ± 2.0 %"."""
    if value is None:
        return "–"
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "") + " %"


def duration(seconds: float | None) -> str:
    """Seconds as "8.2 s", "95 s", "12 min" or "3.4 h"."""
    if seconds is None:
        return "–"
    if seconds < 300:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def best(run: Run) -> tuple[str, Round] | None:
    """The score that ranks this run's checkpoints, and the best round by it; the start is not in the race."""
    for key, _ in SCORES:
        trained = [r for r in run.evaluated if r.index >= 0 and number(r.summary, "eval", key) is not None]
        if trained:
            return key, max(trained, key=lambda r: number(r.summary, "eval", key) or 0.0)
    return None


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as dotted names and printed values."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = str(value)
    return flat
