"""Compiles programs in processes of their own and gathers what came out, whatever happens to the compiler."""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

from selfplay_jax.errors import UserError
from selfplay_jax.models import ModelConfig
from selfplay_jax.preflight.hlo import Traffic
from selfplay_jax.preflight.topologies import GIB, Slice, environment

FITS, TOO_LARGE, CRASHED, LATE = "fits", "too large", "the compiler crashed", "out of time"


@dataclasses.dataclass
class Outcome:
    """What compiling one program said, sizes in bytes per device; the fields before `seconds`: see `programs.Program`.

    memory: arguments, outputs that reuse no argument, temporaries and the program itself, as the compiler laid them
    out; empty where it gave up. needed: what it said it needed when that was too much. notes: what the mesh does not
    divide, in words. once, repeated: see `hlo.read`; None where the compiled program could not be read, and `message`
    has the last words.
    """

    program: str
    flops: float = 0.0
    pallas_flops: float = 0.0
    model_flops: float = 0.0
    rows: int = 0
    tokens: int = 0
    mesh: dict[str, int] = dataclasses.field(default_factory=dict)
    copies: int = 1
    notes: list[str] = dataclasses.field(default_factory=list)
    holds: dict[str, float] = dataclasses.field(default_factory=dict)
    beside: dict[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    needed: float = 0.0
    message: str = ""
    problem: str = ""
    once: Traffic | None = None
    repeated: Traffic | None = None

    @property
    def total(self) -> float:
        """Bytes per device while the program runs, with what lies beside it; 0 where the compiler gave up."""
        return sum(self.memory.values()) + sum(self.beside.values()) if self.memory else 0.0

    def status(self, wanted: Slice) -> str:
        """FITS, TOO_LARGE, CRASHED, LATE or another problem in words."""
        if self.problem:
            return self.problem
        return FITS if self.total <= wanted.chip.hbm_bytes else TOO_LARGE


# (config, programs, seconds or None for no limit) -> outcomes
Compiler = Callable[[Any, Sequence[str], float | None], list[Outcome]]


def compile_programs(
    config: Any,
    shape: ModelConfig,
    wanted: Slice,
    programs: Sequence[str],
    *,
    limit: float | None = None,
    on_stage: Callable[[str, str], None] = lambda program, stage: None,
) -> list[Outcome]:
    """Compiles `programs` for a slice, in order; a program that crashes the compiler costs only itself.

    Args:
      config: the run's config (a ConfigDict).
      limit: seconds for all of them; what is not done by then is LATE.
      on_stage: told (program, stage) as work goes on; stages are started, traced, compiled, failed, read.
    Raises:
      UserError: the mesh does not fit the slice, the slice is unknown to the compiler, or the compiler cannot start.
    """
    outcomes: dict[str, Outcome] = {}
    pending = list(programs)
    with contextlib.closing(_Timer(limit)) as timer:
        while pending:
            request = {
                "config": json.loads(config.to_json()),
                "shape": dataclasses.asdict(shape),
                "topology": wanted.topology,
                "slices": wanted.slices,
                "programs": pending,
            }
            last, words = _run(request, outcomes, timer, on_stage)
            if timer.over:
                for name in pending:
                    outcome = outcomes.setdefault(name, Outcome(name))
                    outcome.problem = outcome.problem or ("" if outcome.memory else LATE)
                break
            if last is None:
                raise UserError(
                    f"the process that compiles ended before it compiled anything; its last words: {words}."
                )
            current = outcomes[last]
            if not current.memory and not current.problem:
                current.problem, current.message = CRASHED, words
            elif current.memory and current.once is None:
                current.message = words
            pending = pending[pending.index(last) + 1 :]
    return [outcomes[name] for name in programs]


class _Timer:
    def __init__(self, limit: float | None):
        self.over = False
        self._process: subprocess.Popen[str] | None = None
        self._timer = threading.Timer(limit, self._end) if limit is not None else None
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def watch(self, process: "subprocess.Popen[str] | None") -> None:
        self._process = process
        if self.over and process is not None:
            process.kill()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self.over = True
        if self._process is not None:
            self._process.kill()


def _run(
    request: dict[str, Any],
    outcomes: dict[str, Outcome],
    timer: _Timer,
    on_stage: Callable[[str, str], None],
) -> tuple[str | None, str]:
    """Runs one process over the pending programs; (the program it was at last, its last words on stderr)."""
    package = pathlib.Path(__file__).parents[2]
    env = environment()
    env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package), env.get("PYTHONPATH"))))
    last: str | None = None
    with tempfile.TemporaryFile("w+", errors="replace") as noise, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "selfplay_jax.preflight.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True, env=env,
        )  # fmt: skip
        timer.watch(process)
        try:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps({**request, "folder": folder}))
            process.stdin.close()
            for line in process.stdout:
                row = json.loads(line)
                if row["stage"] == "refused":
                    raise UserError(row["message"])
                last = row["program"]
                _take(outcomes.setdefault(last, Outcome(last)), row)
                on_stage(last, row["stage"])
            process.wait()
        finally:
            process.kill()
            process.wait()
            timer.watch(None)
        noise.seek(0)
        return last, last_words(noise.read()) or f"exit code {process.returncode}"


def last_words(text: str) -> str:
    """The line of a dead process's stderr that says why: what the compiler checked in vain, else the last one."""
    lines = text.strip().splitlines()
    checks = (line for line in lines if re.match(r"F\d{4} ", line) or "Check failed" in line)
    return next(checks, lines[-1] if lines else "")[:500]


def _take(outcome: Outcome, row: dict[str, Any]) -> None:
    for name, value in row.items():
        if name in ("once", "repeated"):
            setattr(outcome, name, Traffic(**value))
        elif name not in ("program", "stage"):
            setattr(outcome, name, value)
    if row["stage"] == "failed":
        outcome.problem, outcome.needed = diagnose(row["message"])


_UNITS = {"": 1.0, "B": 1.0, "K": 2.0**10, "M": 2.0**20, "G": GIB, "T": 2.0**40}
_NEEDED = (
    r"total memory required for [\w ]+ \((?P<size>[\d.]+)(?P<unit>[BKMGT]?)\) exceeds",
    r"Used (?P<size>[\d.]+)(?P<unit>[BKMGT]?) of [\d.]+[BKMGT]? hbm",
)


def diagnose(message: str) -> tuple[str, float]:
    """(problem, bytes that were needed or 0) from a compiler's error."""
    if "RESOURCE_EXHAUSTED" not in message and "Oom" not in message:
        first = message.strip().splitlines()[0] if message.strip() else "no message"
        return f"the compiler refused it: {first[:200]}", 0.0
    for pattern in _NEEDED:
        found = re.search(pattern, message)
        if found:
            return TOO_LARGE, float(found["size"]) * _UNITS[found["unit"]]
    return TOO_LARGE, 0.0
