"""What a model directory holds, and whether it would load: `python -m selfplay_jax.models.inspect DIR [--json]`.

Reads config files and the headers of weight files, never a tensor. Exit code 0 if the model and its tokenizer would
load, 1 if not; then the reasons are listed, and one sentence on stderr sums them up.
"""

import argparse
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from selfplay_jax.errors import UserError
from selfplay_jax.models.config import ModelConfig
from selfplay_jax.models.hf_config import ARCHITECTURES
from selfplay_jax.models.hf_directory import read_config, tokenizer_files
from selfplay_jax.models.hf_tensors import parameter_count
from selfplay_jax.models.hf_weights import Weights, stored_bytes, survey

SHOWN = 20  # problems in the printed text; --json has them all


def inspect(path: str | pathlib.Path) -> dict[str, Any]:
    """Everything that the command prints, as plain values that JSON can hold.

    Keys: directory, family, architecture, sizes, rope, tokens, parameters, bytes (in the files' types, in float32 and
    in bfloat16), files, tensors (counts: stored, loaded, ignored), tokenizer, problems (kind, name and sentence of
    each), loadable.

    Raises:
        UserError: if `path` is no directory, or its config.json or index is missing, broken or unsupported.
    """
    directory = pathlib.Path(path).expanduser()
    if not directory.is_dir():
        raise UserError(f"{directory}: no such directory; download a repository of the Hub first (`hf download NAME`)")
    config = read_config(directory)
    weights = survey(directory, config)
    tokenizer, complaints = _tokenizer(directory, config)
    problems = [dataclasses.asdict(problem) for problem in weights.problems] + complaints
    count = parameter_count(config)
    return {
        "directory": str(directory),
        "family": config.family,
        "architecture": ARCHITECTURES[config.family],
        "sizes": _sizes(config),
        "rope": {
            "theta": config.rope_theta,
            "scaling": None if config.rope_scaling is None else dataclasses.asdict(config.rope_scaling),
        },
        "tokens": {"beginning": config.bos_id, "ends": list(config.stop_ids), "padding": config.pad_id},
        "parameters": count,
        "bytes": {"files": stored_bytes(weights), "float32": 4 * count, "bfloat16": 2 * count},
        "files": {file.name: size for file, size in weights.files.items()},
        "tensors": _tensors(weights),
        "tokenizer": tokenizer,
        "problems": problems,
        "loadable": not problems,
    }


def _sizes(config: ModelConfig) -> dict[str, Any]:
    windowed = None
    if config.sliding_window is not None:
        windowed = {"tokens": config.sliding_window, "from_layer": config.sliding_window_from_layer}
    biases = {"qkv": config.qkv_bias, "attention output": config.out_bias, "mlp": config.mlp_bias}
    return {
        "layers": config.num_layers,
        "hidden": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "feed_forward": config.intermediate_size,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
        "tied_embeddings": config.tie_embeddings,
        "biases": [name for name, there in biases.items() if there],
        "sliding_window": windowed,
    }


def _tensors(weights: Weights) -> dict[str, Any]:
    dtypes: dict[str, int] = {}
    for tensor in weights.stored.values():
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + 1
    faulty = {problem.name for problem in weights.problems}
    loaded = sum(name in weights.stored and name not in faulty for name, _, _ in weights.order)
    return {
        "wanted": len(weights.order),
        "stored": len(weights.stored),
        "loaded": loaded,
        "ignored": weights.ignored,
        "dtypes": dtypes,
    }


def _tokenizer(directory: pathlib.Path, config: ModelConfig) -> tuple[dict[str, Any] | None, list[dict[str, str]]]:
    """What training would get from the directory, and what is wrong with it; weights alone may have no tokenizer."""
    files = [str(file) for file in tokenizer_files(directory)]
    if not files:
        return None, []
    from selfplay_jax.data.templates import check_vocabulary, load_tokenizer  # transformers takes seconds

    try:
        tokenizer = load_tokenizer(directory)
    except UserError as error:
        return None, [{"kind": "tokenizer", "name": "tokenizer", "sentence": str(error)}]
    found = {
        "class": type(tokenizer).__name__,
        "tokens": len(tokenizer),
        "fits": True,
        "chat_template": bool(tokenizer.chat_template),
        "files": files,
    }
    try:
        check_vocabulary(tokenizer, config.vocab_size)
    except UserError as error:
        return found | {"fits": False}, [{"kind": "tokenizer", "name": "tokenizer", "sentence": str(error)}]
    return found, []


def text(report: dict[str, Any]) -> str:
    """The report for people."""
    sizes, size, tensors = report["sizes"], report["bytes"], report["tensors"]
    rows = {
        "model": f"{report['family']} ({report['architecture']})",
        "parameters": f"{report['parameters']:,}",
        "layers": f"{sizes['layers']} of hidden size {sizes['hidden']}, feed-forward {sizes['feed_forward']}",
        "heads": f"{sizes['heads']} of dimension {sizes['head_dim']}, {sizes['kv_heads']} for keys and values",
        "vocabulary": f"{sizes['vocabulary']:,}{', embeddings tied' if sizes['tied_embeddings'] else ''}",
        "biases": ", ".join(sizes["biases"]) or "none",
        "context": f"{sizes['context']:,} tokens{_window(sizes['sliding_window'])}",
        "rope": _rope(report["rope"]),
        "special tokens": ", ".join(f"{name} {_ids(value)}" for name, value in report["tokens"].items()),
        "tokenizer": _tokenizer_line(report),
        "in memory": f"{_human(size['float32'])} in float32, {_human(size['bfloat16'])} in bfloat16",
        "weight files": f"{len(report['files'])}, {_human(size['files'])} of tensors to load",
    }
    lines = [report["directory"], *(f"  {name:<15} {value}" for name, value in rows.items())]
    lines += [f"    {name:<40} {_human(bytes_)}" for name, bytes_ in report["files"].items()]
    stored = ", ".join(f"{count} {dtype}" for dtype, count in tensors["dtypes"].items()) or "none"
    lines.append(f"  {'tensors':<15} {tensors['loaded']} of {tensors['wanted']} would load; stored: {stored}")
    if tensors["ignored"]:
        lines.append(f"  {'ignored':<15} {len(tensors['ignored'])}: {_some(tensors['ignored'])}")
    problems = report["problems"]
    if problems:
        lines.append(f"  problems        {len(problems)}: {_counts(problems)}")
        lines += [f"    {problem['kind']:<11}{problem['sentence']}" for problem in problems[:SHOWN]]
        if len(problems) > SHOWN:
            lines.append(f"    ... and {len(problems) - SHOWN} more (--json lists them all)")
    return "\n".join(lines)


def _counts(problems: list[dict[str, str]]) -> str:
    kinds = [problem["kind"] for problem in problems]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _ids(value: Any) -> str:
    values = value if isinstance(value, list) else [] if value is None else [value]
    return " ".join(str(token) for token in values) or "none"


def _window(window: dict[str, int] | None) -> str:
    if window is None:
        return ""
    start = f" from layer {window['from_layer']} on" if window["from_layer"] else ""
    return f", sliding window {window['tokens']:,}{start}"


def _rope(rope: dict[str, Any]) -> str:
    scaling = rope["scaling"]
    if scaling is None:
        return f"theta {rope['theta']:g}, not scaled"
    line = f"theta {rope['theta']:g}, scaled: {scaling['kind']} by {scaling['factor']:g}"
    if scaling["kind"] == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        line += f", frequency factors {low:g} and {high:g}, from {scaling['original_max_position']:,} tokens"
    return line


def _tokenizer_line(report: dict[str, Any]) -> str:
    tokenizer = report["tokenizer"]
    if tokenizer is None:
        return "does not load" if any(problem["kind"] == "tokenizer" for problem in report["problems"]) else "none"
    fits = "" if tokenizer["fits"] else ", MORE THAN THE VOCABULARY HOLDS"
    template = "with" if tokenizer["chat_template"] else "no"
    return f"{tokenizer['class']}, {tokenizer['tokens']:,} tokens{fits}, {template} chat template"


def _human(size: int | None) -> str:
    if size is None:
        return "not there"
    power = min(3, int(math.log(size, 1000))) if size else 0
    return f"{size} B" if power == 0 else f"{size / 1000**power:.2f} {('kB', 'MB', 'GB')[power - 1]}"


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    options = argparse.ArgumentParser(
        prog="python -m selfplay_jax.models.inspect",
        description="Says what a Hugging Face model directory holds and whether it would load, from headers alone.",
    )
    options.add_argument("directory", metavar="DIR")
    options.add_argument("--json", action="store_true", help="print JSON, with every problem")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report of one directory; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        report = inspect(options.directory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=2, ensure_ascii=False) if options.json else text(report))
    if report["loadable"]:
        return 0
    problems, first = report["problems"], report["problems"][0]["sentence"]
    print(f"error: {report['directory']}: cannot be loaded: {_counts(problems)}; {first}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
