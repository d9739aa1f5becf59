"""Rounds and runs as text: a line per round, a table per run, runs side by side."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from selfplay_jax.report_data import (
    SCORES,
    Run,
    best,
    betas,
    duration,
    load,
    number,
    percent,
    seconds_by_phase,
    short,
)

LINE_WIDTH = 168  # a TPAW round with three players and all its phases


def round_line(summary: Mapping[str, Any]) -> str:
    """One line about a finished round, at most `LINE_WIDTH` columns; what was not measured is left out.

    "target" and "generated" are rewards, β has one weight per player, the newest first, ± is one standard
    error; at the end the seconds of each phase that took half a second or more.

    Args:
      summary: a round's summary.json; round -1 is the SFT warm-up.
    """
    index = summary.get("round", 0)
    parts = ["SFT" if index < 0 else f"round {index}"]
    loss = number(summary, "train", "loss")
    if loss is not None:
        parts.append(f"loss {short(loss)}")
    rewards = (("target", "reward_target"), ("generated", "reward_generated"), ("margin", "margin"))
    values = [(name, number(summary, "train", key)) for name, key in rewards]
    shown = [f"{name} {short(value, sign=True, digits=2)}" for name, value in values if value is not None]
    parts.append(" ".join(shown))
    alpha = number(summary, "train", "alpha")
    parts.append("" if alpha is None else f"α {short(alpha, digits=2)}")
    weights = [f"{value:.2f}".removeprefix("0") for _, value in betas(summary)]
    parts.append(" ".join(["β", *weights]) if weights else "")
    scores = [(name, score(summary, key)) for key, name in reversed(SCORES)]
    parts.append(" ".join(f"{name} {text.replace(' ', '')}" for name, text in scores if text != "–"))
    parts = [part for part in parts if part]
    phases = [(name, f"{value:.0f}") for name, value in seconds_by_phase(summary).items() if value >= 0.5]
    named = " ".join(f"{name} {value}" for name, value in phases)
    for form in [f"{named} s", "+".join(value for _, value in phases) + " s"] if phases else [""]:
        line = " · ".join([*parts, form] if form else parts)
        if len(line) <= LINE_WIDTH:
            return line
    return line[: LINE_WIDTH - 1] + "…"


def table(workdir: epath.PathLike) -> str:
    """All finished rounds of a run as a text table, the SFT start first; columns nobody filled are left out.

    Raises:
      UserError: `workdir` is not a run's directory.
    """
    return run_table(load(workdir))


def run_table(run: Run) -> str:
    """`table` of a run already read."""
    if not run.finished:
        return f"{run.name}: no round has finished yet"
    text = printable(f"{run.name}: {run.method}, preset {run.preset}") + "\n" + text_table(*round_cells(run))
    columns, rows = evaluation_cells(run)
    return f"{text}\n\n{text_table(columns, rows)}" if rows else text


def round_cells(run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and cells of a run's table of rounds."""
    columns = ["round", "makes", "steps", "loss", "reward y", "reward y'", "margin", "log π(y)", "log π(y')"]
    columns += ["α", "β", "greedy", "sampled", "held-out log π(y)", "time"]
    rows = []
    for round_ in run.finished:
        summary = round_.summary
        steps = number(summary, "steps")
        row = [round_.name, f"θ{round_.theta}", "–" if steps is None else f"{steps:.0f}"]
        row.append(short(number(summary, "train", "loss")))
        for key in ("reward_target", "reward_generated", "margin"):
            row.append(short(number(summary, "train", key), sign=True))
        row += [short(number(summary, "train", key)) for key in ("logp_target", "logp_generated", "alpha")]
        row.append(" ".join(f"θ{player} {value:.2f}" for player, value in betas(summary)) or "–")
        row += [
            score(summary, "greedy_accuracy"),
            score(summary, "sampled_accuracy"),
            log_likelihood(summary),
        ]
        row.append(duration(sum(round_.seconds().values()) or None))
        rows.append(row)
    return drop_empty(columns, rows)


def evaluation_cells(run: Run) -> tuple[list[str], list[list[str]]]:
    """Head and cells of what was evaluated beside accuracy and likelihood: a row per number, a column per player."""
    shown = {key for key, _ in SCORES} | {"target_logp"}
    evaluated = run.evaluated
    names = dict.fromkeys(
        key
        for round_ in evaluated
        for key in round_.summary["eval"]
        if f"{key}_se" in round_.summary["eval"] and key not in shown and not key.startswith("validation_")
    )
    rows = []
    for name in names:
        cells = []
        for round_ in evaluated:
            value, error = (number(round_.summary, "eval", key) for key in (name, f"{name}_se"))
            cells.append(short(value) + (f" ± {short(error)}" if error is not None else ""))
        rows.append([name, *cells])
    return ["evaluation", *(f"θ{round_.theta}" for round_ in evaluated)], rows


def run_cells(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Head and cells of the comparison: a row per run."""
    columns = ["run", "method", "preset", "rounds"]
    for _, name in SCORES:
        columns += [f"{name}: start", "final", "best"]
    columns += ["held-out log π(y): start", "final", "time"]
    rows = []
    for name, run in zip(names(runs), runs, strict=True):
        evaluated = run.evaluated
        start = next((r.summary for r in evaluated if r.theta == 0), {})
        final = next((r.summary for r in reversed(evaluated) if r.index >= 0), {})
        done = sum(r.index >= 0 for r in run.finished)
        planned = number(run.config, "rounds")
        row = [
            name,
            run.method,
            run.preset,
            f"{done}" if planned in (None, done) else f"{done} of {planned:.0f}",
        ]
        top = best(run)
        for key, _ in SCORES:
            row += [score(start, key), score(final, key)]
            row.append(f"{score(top[1].summary, key)} (θ{top[1].theta})" if top and top[0] == key else "–")
        row += [log_likelihood(start), log_likelihood(final), duration(run.seconds() or None)]
        rows.append(row)
    return drop_empty(columns, rows)


def names(runs: Sequence[Run]) -> list[str]:
    """The runs' directory names, with as many parent directories as it takes to tell them apart."""
    parts = [[part for part in run.path.parts if part != "/"] or [str(run.path)] for run in runs]
    depth = 1
    while depth < max(map(len, parts), default=1) and len({tuple(p[-depth:]) for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def score(summary: Mapping[str, Any], key: str) -> str:
    """An accuracy of the evaluation with its standard error."""
    return percent(number(summary, "eval", key), number(summary, "eval", f"{key}_se"))


def log_likelihood(summary: Mapping[str, Any]) -> str:
    """The held-out log π(target) with its standard error."""
    value, error = number(summary, "eval", "target_logp"), number(summary, "eval", "target_logp_se")
    return "–" if value is None else f"{value:.2f}" + (f" ± {error:.2f}" if error is not None else "")


def drop_empty(columns: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leaves out the columns that hold nothing but dashes."""
    keep = [i for i in range(len(columns)) if any(row[i] != "–" for row in rows)]
    return [columns[i] for i in keep], [[row[i] for i in keep] for row in rows]


def printable(text: str) -> str:
    """Text without control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    cells = [[printable(cell) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = []
    for row in cells:
        lines.append(
            "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        )
    lines.insert(1, "  ".join("─" * width for width in widths))
    return "\n".join(lines)
