"""What preflight prints: for one slice everything, for several a table."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from selfplay_jax.preflight import programs
from selfplay_jax.preflight.compile import FITS, TOO_LARGE, Outcome
from selfplay_jax.preflight.result import Assumptions, Result, parts, tokens_per_second
from selfplay_jax.preflight.speed import speed
from selfplay_jax.preflight.topologies import GIB

_TITLES = {
    "train": "training step",
    "score": "scoring",
    "fill": "sampling: prompts in",
    "decode": "sampling: one token each",
}
_COLUMNS = ("parameters", "optimizer", "frozen base", "cache", "batch", "temporaries", "other", "beside")


def show(console: Console, result: Result, assumptions: Assumptions, notes: Sequence[str]) -> None:
    """Everything about one slice."""
    wanted = result.slice
    mesh = result.mesh
    count = f"{wanted.slices} slices of {wanted.topology}" if wanted.slices > 1 else wanted.topology
    console.print(
        f"\n[bold]{wanted.name}[/]: {count}, {wanted.chips} chips on {wanted.hosts} host(s), "
        f"{wanted.chip.hbm_bytes / GIB:.2f} GiB usable per {'core' if wanted.chip.devices > 1 else 'chip'}"
        + (f"; mesh {' x '.join(f'{name} {size}' for name, size in mesh.items())}" if mesh else "")
    )
    if result.refused:
        console.print(f"not compiled: {result.refused}")
        return
    console.print(_memory(result))
    for outcome in result.outcomes:
        if outcome.status(wanted) != FITS:
            console.print(f"{_TITLES[outcome.program]}: {_problem(outcome, result)}")
    if any(outcome.memory for outcome in result.outcomes):
        console.print(_speeds(result))
    _show_round(console, result, assumptions)
    if result.advice:
        _show_advice(console, result)
    for note in (*notes, *_footnotes(result)):
        console.print(f"- {note}", style="dim")


def _memory(result: Result) -> Table:
    used = [name for name in _COLUMNS if any(parts(outcome).get(name) for outcome in result.outcomes)]
    table = Table(title="GiB per chip" if result.slice.chip.devices == 1 else "GiB per core", title_justify="left")
    table.add_column("program")
    for name in (*used, "total", "headroom"):
        table.add_column(name, justify="right")
    table.add_column("")
    for outcome in result.outcomes:
        sizes = parts(outcome)
        cells = [f"{sizes[name] / GIB:.2f}" if name in sizes else "?" for name in used]
        room = result.slice.chip.hbm_bytes - outcome.total
        cells += [f"{outcome.total / GIB:.2f}", f"{room / GIB:.2f}"] if outcome.memory else ["?", "?"]
        status = outcome.status(result.slice)
        style = "green" if status == FITS else "bold red"
        table.add_row(_TITLES[outcome.program], *cells, f"[{style}]{_verdict(status)}[/]")
    return table


def _verdict(status: str) -> str:
    return {FITS: "fits", TOO_LARGE: "DOES NOT FIT"}.get(status, "NOT KNOWN")


def _problem(outcome: Outcome, result: Result) -> str:
    status = outcome.status(result.slice)
    if status != TOO_LARGE:
        return f"{status}. {outcome.message.strip().splitlines()[0][:300] if outcome.message else ''}"
    limit = result.slice.chip.hbm_bytes / GIB
    if outcome.memory:
        beside = ", ".join(outcome.beside) or "nothing"
        return f"{outcome.total / GIB:.2f} GiB with what lies beside it ({beside}) exceed {limit:.2f} GiB."
    needed = f"{outcome.needed / GIB:.2f} GiB" if outcome.needed else "more than there is"
    return f"the compiler needs {needed}; the chip has {limit:.2f} GiB."


def _speeds(result: Result) -> Table:
    table = Table(title="One run of each program, by the compiler's estimates", title_justify="left")
    table.add_column("program")
    headings = ("tokens", "model TFLOP", "with recomputing", "computing ms", "ICI MB", "ICI ms")
    across = ("DCN MB", "DCN ms") if result.slice.slices > 1 else ()
    for name in (*headings, *across, "MFU at most", "nothing hidden", "tokens/s/chip", "compiled in s"):
        table.add_column(name, justify="right")
    for outcome in result.outcomes:
        took = speed(outcome, result.slice)
        if took is None:
            continue
        chip, rate = result.slice.chip, tokens_per_second(outcome, result.slice)
        cells = [
            f"{outcome.tokens:,}",
            f"{outcome.model_flops / 1e12:,.4g}",
            f"{outcome.flops / 1e12:,.4g}",
            f"{took.compute * 1e3:,.4g}",
            f"{took.ici * chip.ici_bandwidth / 1e6:,.4g}",
            f"{took.ici * 1e3:,.4g}",
        ]
        if across:
            cells += [f"{took.dcn * chip.dcn_bandwidth / 1e6:,.4g}", f"{took.dcn * 1e3:,.4g}"]
        cells += [f"{took.mfu_hidden:.1%}", f"{took.mfu_in_turn:.1%}", f"{rate:,.0f}" if rate else ""]
        table.add_row(_TITLES[outcome.program], *cells, f"{outcome.seconds:.0f}")
    return table


def _show_round(console: Console, result: Result, assumptions: Assumptions) -> None:
    if assumptions.prompts is None:
        console.print("Hours per round: unknown number of prompts, say --examples=N.")
        return
    if not result.phases or result.hours is None:
        return
    pieces = ", ".join(f"{phase.name} {_duration(phase.seconds)}" for phase in result.phases)
    console.print(f"A round: {_duration(result.hours * 3600)} ({pieces}).")
    console.print(
        f"- assumed: {assumptions.prompts:,} prompts, every one padded to the longest allowed; sampled responses of "
        f"{assumptions.response_tokens:g} tokens on average; communication waits for computing and computing for it; "
        f"{assumptions.efficiency:.0%} of the speed that the compiler estimates; no evaluation, loading or saving",
        style="dim",
    )


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.2g} s"


def _show_advice(console: Console, result: Result) -> None:
    fitting = [tried for tried in result.advice if tried.status == FITS]
    console.print("\n[bold]What would make it fit[/]" if fitting else "\n[bold]Nothing that was tried makes it fit[/]")
    for tried in result.advice:
        size = f", {tried.total / GIB:.2f} GiB" if tried.total else ""
        mark = "[green]fits[/]" if tried.status == FITS else tried.status
        console.print(f"  {tried.flags}  ({mark}{size}; {tried.meaning})", highlight=False)


def _footnotes(result: Result) -> list[str]:
    notes = [
        "temporaries are activations, gradients and whatever else the compiler needs for a while; beside is what lies "
        "in memory without being an argument: "
        + ("; ".join(sorted({name for o in result.outcomes for name in o.beside})) or "nothing here"),
    ]
    if any(outcome.memory for outcome in result.outcomes):
        notes.append(
            "MFU at most: communication hidden behind computing; nothing hidden: one after the other. Both from "
            "estimated cycles and from bytes over all of a chip's links: contention, latency and the hosts' work are "
            "left out"
        )
    copies = max((outcome.copies for outcome in result.outcomes), default=1)
    if copies > 1:
        notes.append(
            f"sampling: each of the {copies} hosts samples its own prompts, in sampling.slots slots of its own"
        )
    notes += next((outcome.notes for outcome in result.outcomes if outcome.notes), [])
    if any(outcome.pallas_flops for outcome in result.outcomes):
        notes.append("attention kernels (Pallas) have no estimate: their whole grid is counted at the peak rate")
    if not all((took := speed(o, result.slice)) is None or took.estimated for o in result.outcomes):
        notes.append(
            "a program without readable estimates counts as matrix products at the peak rate: a bound, no more"
        )
    notes += [f"{_TITLES[o.program]} could not be read: {o.message}" for o in result.outcomes if o.memory and o.message]
    return notes


def show_table(console: Console, results: Sequence[Result]) -> None:
    """One line per slice."""
    table = Table(title="GiB are those of the largest program, per chip", title_justify="left")
    for name, justify in (
        ("slice", "left"), ("chips", "right"), ("fits", "left"), ("GiB", "right"), ("of", "right"),
        ("training MFU at most", "right"), ("nothing hidden", "right"), ("hours per round", "right"),
        ("compiled in s", "right"),
    ):  # fmt: skip
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for result in results:
        table.add_row(*row(result))
    console.print(table)


def row(result: Result) -> list[str]:
    """A slice's line of the table: plain text."""
    largest = result.largest()
    took = next((speed(o, result.slice) for o in result.outcomes if o.program == programs.NAMES[0]), None)
    fits = {FITS: "yes", TOO_LARGE: f"no: {largest.program if largest else ''}"}.get(result.status, result.status)
    return [
        result.slice.name,
        str(result.slice.chips),
        fits,
        f"{(largest.total or largest.needed) / GIB:.2f}" if largest else "",
        f"{result.slice.chip.hbm_bytes / GIB:.2f}",
        f"{took.mfu_hidden:.0%}" if took else "",
        f"{took.mfu_in_turn:.0%}" if took else "",
        f"{result.hours:.2g}" if result.hours is not None and result.status == FITS else "",
        f"{sum(o.seconds for o in result.outcomes):.0f}",
    ]


def heading(config: Any, parameters: int, source: str) -> str:
    """The line above everything: which experiment, which model."""
    return f"{config.method} ({config.preset}), {parameters / 1e9:.3g}B parameters: {source}"
