"""The command line of preflight: reads the flags, compiles, prints.

Exit codes: 0 it fits, 1 a user's error (one sentence on stderr), 3 it does not fit or could not be compiled.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
from rich.console import Console

from selfplay_jax import game
from selfplay_jax.errors import UserError
from selfplay_jax.main import read_flags
from selfplay_jax.methods import WARM_UP
from selfplay_jax.models import ModelConfig
from selfplay_jax.preflight import advise as advising
from selfplay_jax.preflight import programs, report, shapes, speed, topologies
from selfplay_jax.preflight.compile import FITS, TOO_LARGE, Outcome, compile_programs
from selfplay_jax.preflight.result import Assumptions, Result

DOES_NOT_FIT = 3

# What --all looks at: from the smallest slice worth trying to a whole pod.
ALL = ("v5litepod-16", "v5litepod-64", "v5litepod-256", "v6e-8", "v6e-16", "v6e-64", "v6e-256", "v4-32", "v4-128",
       "v5p-8", "v5p-16", "v5p-32", "v5p-128")  # fmt: skip

_USAGE = """python -m selfplay_jax.preflight --config=FILE[:preset] --topology=NAME[,NAME...] [--config.FIELD=VALUE ...]

Compiles the programs of a run for a TPU slice, on this machine, and says whether they fit and how fast they can be.
A big model takes the compiler minutes for each program; what does not fit is known within seconds."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the flags.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="selfplay_jax.preflight", usage=_USAGE, allow_abbrev=False)
    add = functools.partial(parser.add_argument)
    add("--topology", default="", help="v5litepod-16, v5p-16, v6e-8, v4-32, v5e:4x4, 2xv5p-256; several with commas")
    add("--all", action="store_true", help="a table over " + ", ".join(ALL))
    add("--slices", type=int, default=1, help="slices of --topology, joined by the data centre's network")
    add("--model", default="", help="a directory with the model's config.json, or a model whose sizes are known")
    add("--programs", default="", help="train,score,fill,decode: only these")
    add("--json", action="store_true", help="print JSON, sizes in GiB and times in seconds")
    add("--no-advice", action="store_true", help="do not look for what would make it fit")
    add("--advice-minutes", type=float, default=30.0, help="time for that search (default 30)")
    add("--examples", type=int, default=None, help="prompts per round, where the config does not say")
    add("--response-tokens", type=float, default=None, help="mean length of sampled responses (default: the longest)")
    add("--efficiency", type=float, default=1.0, help="share of the estimated speed that you expect (default 1)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    try:
        options, rest = _parser().parse_known_args(sys.argv[1:] if argv is None else argv)
        unknown = [arg for arg in rest if not arg.lstrip("-").startswith(("config=", "config.", "noconfig."))]
        if unknown:
            raise UserError(f"unknown argument {unknown[0]!r}; --help lists the flags.")
        return _run(options, rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _slices(options: argparse.Namespace) -> list[topologies.Slice]:
    named = [name for name in options.topology.split(",") if name.strip()]
    if options.all:
        named += [name for name in ALL if name not in named]
    if not named:
        raise UserError("say which slice to compile for: --topology=v5p-16, or --all for a table over many.")
    return [topologies.find(name, options.slices) for name in named]


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("examples", "response_tokens", "efficiency", "advice_minutes"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UserError(f"--{name.replace('_', '-')}={value} must be a number above 0.")


def _run(options: argparse.Namespace, config_flags: list[str]) -> int:
    _check_numbers(options)
    slices = _slices(options)
    topologies.check_compiler()
    config, _ = read_flags(config_flags)
    game.check(config)
    shape, source = shapes.find(config, options.model)
    wanted = [name for name in options.programs.split(",") if name] or programs.names(config)
    programs.check(config, wanted)
    assumptions = Assumptions(
        prompts=speed.prompts(config, options.examples),
        response_tokens=options.response_tokens or float(config.sampling.max_new_tokens),
        efficiency=options.efficiency,
    )
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    parameters = _parameters(config, shape)
    if not options.json:
        console.print(report.heading(config, parameters, source))
    results = []
    for one in slices:
        found = _one(config, shape, one, wanted, assumptions, options, advise=len(slices) == 1)
        results.append(found)
        if not options.json and len(slices) == 1:
            report.show(console, found, assumptions, _notes(config, one))
    if options.json:
        print(json.dumps(_json(config, source, parameters, assumptions, results), indent=2))
    elif len(slices) > 1:
        report.show_table(console, results)
    return 0 if all(one.status == FITS for one in results) else DOES_NOT_FIT


def _one(
    config: Any,
    shape: ModelConfig,
    wanted: topologies.Slice,
    names: list[str],
    assumptions: Assumptions,
    options: argparse.Namespace,
    *,
    advise: bool,
) -> Result:
    """The Result of one slice."""
    config = _across_slices(config, wanted)
    began = time.monotonic()

    def on_stage(program: str, stage: str) -> None:
        if stage in ("started", "compiled", "failed"):
            _say(f"[{time.monotonic() - began:5.0f} s] {wanted.name}: {program} {stage}")

    def compiler(changed: Any, names: Sequence[str], limit: float | None = None) -> list[Outcome]:
        return compile_programs(changed, shape, wanted, names, limit=limit, on_stage=on_stage)

    try:
        outcomes = compiler(config, names)
    except UserError as error:
        if advise:
            raise
        return Result(wanted, refused=str(error))
    phases = []
    if assumptions.prompts is not None:
        phases = speed.phases(
            config, outcomes, wanted,
            count=assumptions.prompts, mean_response=assumptions.response_tokens, efficiency=assumptions.efficiency,
        )  # fmt: skip
    found = Result(wanted, outcomes, phases)
    if advise and not options.no_advice and found.status == TOO_LARGE:
        minutes = options.advice_minutes
        _say(f"it does not fit; looking for what would, for {minutes:g} minutes at most (--no-advice: not at all)")
        tried = advising.advise(
            config, shape, wanted, outcomes, compiler,
            seconds=minutes * 60, on_try=lambda flags: _say(f"trying {flags}"),
        )  # fmt: skip
        found = dataclasses.replace(found, advice=tried)
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def _across_slices(config: Any, wanted: topologies.Slice) -> Any:
    """With several slices `replica` lies across them; the config's own value is kept where it does."""
    if config.mesh.replica % wanted.slices == 0 or config.mesh.replica == -1:
        return config
    changed = config.copy_and_resolve_references()
    changed.mesh.replica = wanted.slices
    return changed


def _notes(config: Any, wanted: topologies.Slice) -> list[str]:
    notes = []
    if _across_slices(config, wanted) is not config:
        notes.append(f"compiled with --config.mesh.replica={wanted.slices}: the model is copied to every slice")
    if config.sft.epochs and config.method != WARM_UP:
        notes.append("the SFT warm-up before the first round is not compiled: its groups have one response each")
    return notes


def _parameters(config: Any, shape: ModelConfig) -> int:
    model = dataclasses.replace(programs.make_model(config, shape), lora=None)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model.abstract_params()))


def _json(
    config: Any, source: str, parameters: int, assumptions: Assumptions, results: Sequence[Result]
) -> dict[str, Any]:
    return {
        "method": config.method,
        "preset": config.preset,
        "model": source,
        "parameters": parameters,
        "config": json.loads(config.to_json()),
        "assumptions": dataclasses.asdict(assumptions),
        "slices": [one.to_json() for one in results],
    }
