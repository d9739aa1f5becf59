"""Compiles TPAW's programs for several models and TPU slices, and writes what came out as docs/preflight.md.

    python benchmarks/preflight_table.py [--models=...] [--topologies=...] [--programs=...]

Every cell (model, slice, program) is a process of its own whose answer is kept in --cache, so that a killed run goes
on where it was; delete the folder to measure anew. Other flags, such as --config.model.remat=dots, go to every cell. A
cell takes up to ten minutes on two cores. Needs libtpu (extra `tpu`).
"""

import argparse
import hashlib
import importlib.metadata
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
MODELS = {
    "Qwen2.5-1.5B": "configs/tpaw.py:ultrachat_qwen2.5_1.5b",
    "Llama-3.1-8B": "configs/tpaw.py:ultrachat_llama3.1_8b",
}
TOPOLOGIES = ("v5litepod-16", "v5litepod-256", "v5p-16", "v6e-16")
PROGRAMS = ("train", "score", "fill", "decode")
# A batch has one row per chip at least: 256 chips take four times the preset's 64 prompts.
FLAGS = {"v5litepod-256": ("--config.train.batch_size=256", "--config.scoring.batch_size=256")}


def compiler() -> str:
    """The compiler and its version."""
    try:
        return f"libtpu {importlib.metadata.version('libtpu')}"
    except importlib.metadata.PackageNotFoundError:
        sys.exit("libtpu, the TPU compiler, is not installed: make setup TPU=1")


def cell(model: str, topology: str, program: str, extra: Sequence[str], cache: pathlib.Path) -> dict[str, Any]:
    """What preflight says of one program on one slice: from the cache, else compiled now."""
    flags = [f"--config={MODELS[model]}", f"--topology={topology}", *FLAGS.get(topology, ()), *extra]
    key = hashlib.sha256(" ".join([compiler(), *flags]).encode()).hexdigest()[:8]
    kept = cache / f"{model}_{topology}_{program}_{key}.json"
    if not kept.exists():
        began = time.monotonic()
        print(f"{model} on {topology}: {program} ...", end=" ", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "selfplay_jax.preflight", *flags, f"--programs={program}", "--json", "--no-advice"],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode not in (0, 3):
            sys.exit(f"\npreflight failed ({done.returncode}): {done.stderr.strip().splitlines()[-1:]}")
        cache.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(".partial")
        partial.write_text(done.stdout)
        partial.rename(kept)
        print(f"{time.monotonic() - began:.0f} s")
    return json.loads(kept.read_text())


def memory_row(model: str, answer: dict[str, Any]) -> str:
    """A line of the memory table."""
    (result,) = answer["slices"]
    (program,) = result["programs"]
    gib = program["gib"]
    known = program["total_gib"] > 0
    cells = [
        model,
        result["slice"],
        " x ".join(str(size) for size in program["mesh"].values())
        + (f", on each of {program['copies']} hosts" if program["copies"] > 1 else ""),
        program["name"],
        f"{gib['parameters']:.2f}",
        f"{gib['optimizer']:.2f}" if gib["optimizer"] else "",
        f"{gib['cache']:.2f}" if gib["cache"] else "",
        f"{gib['temporaries']:.2f}" if known else "",
        f"{gib['beside']:.2f}" if gib["beside"] else "",
        f"{program['total_gib'] or program['needed_gib']:.2f}",
        f"{result['hbm_gib']:.2f}",
        {"fits": "yes", "too large": "**no**"}.get(program["status"], program["status"]),
    ]
    return f"| {' | '.join(cells)} |"


def speed_row(model: str, answer: dict[str, Any]) -> str | None:
    """A line of the speed table, None for a program that was not compiled."""
    (result,) = answer["slices"]
    (program,) = result["programs"]
    took = program["seconds"]
    if not took:
        return None
    cells = [
        model,
        result["slice"],
        program["name"],
        f"{program['rows']}",
        f"{program['tokens']:,}",
        f"{program['model_flops'] / 1e12:,.4g}",
        f"{program['hardware_flops'] / 1e12:,.4g}",
        f"{took['compute'] * 1e3:,.4g}",
        f"{took['ici'] * 1e3:,.3g}",
        f"{took['mfu_hidden']:.0%}",
        f"{took['mfu_in_turn']:.0%}",
        f"{program['tokens_per_second_per_chip']:,.0f}",
        f"{program['compile_seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def round_row(model: str, answers: Sequence[dict[str, Any]]) -> str:
    """A line of the table of rounds: hours by phase."""
    phases = {phase["name"]: phase["seconds"] for a in answers for phase in a["slices"][0]["round"]["phases"]}
    result = answers[0]["slices"][0]
    fits = all(answer["slices"][0]["fits"] for answer in answers)
    sampling = sum(seconds for name, seconds in phases.items() if name.startswith("sampling"))
    hours = [sampling / 3600, phases.get("scoring", 0.0) / 3600, phases.get("training", 0.0) / 3600]
    cells = [model, result["slice"], str(result["chips"])]
    cells += [f"{h:.2g}" for h in (*hours, sum(hours))] if fits else ["does not fit as it is", "", "", ""]
    return f"| {' | '.join(cells)} |"


_PAGE = """# What TPAW needs on TPUs

Compiled by the TPU compiler ({compiler}) on a machine without TPUs by `benchmarks/preflight_table.py{extra}`; nothing
here was run.
The programs are those of a steady round of the presets {presets}:
prompts and responses at their longest, float32 parameters and bfloat16 computing. Flags besides the preset's: {flags}.
`python -m selfplay_jax.preflight --config=... --topology=...` prints the same for any config, and looks for what would
make it fit.

## Memory, GiB per chip

Mesh: replica x fsdp x tensor. Temporaries are activations, gradients and what else the compiler needs for a while.
Beside is what lies in memory without being an argument: the policy in the training layout while it samples, and while
another player scores. The total of what does not fit is what the compiler asked for.

| model | slice | mesh | program | parameters | optimizer | cache | temporaries | beside | total | of | fits |
|---|---|---|---|---|---|---|---|---|---|---|---|
{memory}

## Speed of one run of each program, as the compiler estimates it

Computing: estimated cycles / clock, attention kernels at the peak rate. ICI: bytes sent / bandwidth of all of a chip's
links. MFU at most: communication hidden behind computing; in turn: nothing hidden. Latency, contention, hosts and data
are left out of both. A run of `decode` is one token of every slot.

| {speed_columns} |
|{speed_rule}|
{speeds}

## Hours per round

{prompts} prompts, every one padded to the longest; sampled responses of {tokens:g} tokens on average; nothing hidden;
{efficiency:.0%} of the compiler's estimated speed; evaluation, loading and saving are left out.

| model | slice | chips | sampling | scoring | training | together |
|---|---|---|---|---|---|---|
{rounds}
"""
_SPEED = (
    "model", "slice", "program", "rows", "tokens", "model TFLOP", "with recomputing", "computing ms", "ICI ms",
    "MFU at most", "in turn", "tokens/s/chip", "compiled in s",
)  # fmt: skip


def page(answers: dict[tuple[str, str], list[dict[str, Any]]], extra: Sequence[str]) -> str:
    """The Markdown page."""
    assumed = next(iter(answers.values()))[0]["assumptions"]
    cells = [(model, answer) for (model, _), several in answers.items() for answer in several]
    flags = "; ".join(f"`{' '.join(flags)}` on {name}" for name, flags in FLAGS.items())
    return _PAGE.format(
        compiler=compiler(),
        extra="".join(f" {flag}" for flag in extra),
        presets=" and ".join(f"`{config}`" for config in MODELS.values()),
        flags=flags or "none",
        memory="\n".join(memory_row(model, answer) for model, answer in cells),
        speed_columns=" | ".join(_SPEED),
        speed_rule="|".join("---" for _ in _SPEED),
        speeds="\n".join(filter(None, (speed_row(model, answer) for model, answer in cells))),
        prompts=f"{assumed['prompts'] or 0:,}",
        tokens=assumed["response_tokens"],
        efficiency=assumed["efficiency"],
        rounds="\n".join(round_row(model, several) for (model, _), several in answers.items()),
    )


def main() -> None:
    """Fills the cells that are missing and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("~/.cache/selfplay_jax/preflight"))
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "docs" / "preflight.md")
    options, extra = parser.parse_known_args()
    cache = options.cache.expanduser()
    answers: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for model in options.models.split(","):
        for topology in options.topologies.split(","):
            answers[model, topology] = [
                cell(model, topology, program, extra, cache) for program in options.programs.split(",")
            ]
            options.output.write_text(page(answers, extra), encoding="utf-8")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
