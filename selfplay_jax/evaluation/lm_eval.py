"""Benchmarks of lm-evaluation-harness on a checkpoint or a Hugging Face directory, with our scoring and sampler.

    python -m selfplay_jax.evaluation.lm_eval --model DIR --tasks leaderboard,gsm8k [--output results.json]

DIR is a model's directory or a run's workdir. Tasks are lm-eval's tasks and groups, and the suites open_llm_v1,
open_llm_v2, tspin and tpaw. Exit codes: 0 done, 1 a user's error (one sentence on stderr).
"""

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from selfplay_jax.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    options = argparse.ArgumentParser(
        prog="python -m selfplay_jax.evaluation.lm_eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = options.add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face directory, or a run's workdir")
    add("--tasks", required=True, help="tasks, groups and suites, separated by commas")
    add("--player", help="of a workdir: a player's number, best or final (default final)")
    add("--include_path", metavar="DIR", help="a directory with more task YAML files")
    add("--num_fewshot", type=int, help="examples in the prompt, in place of the tasks' and suites' own numbers")
    add("--limit", type=float, help="examples per task (below 1: their share); for trying things out")
    add("--batch_size", type=int, default=16, help="contexts scored, or responses decoded, together (default 16)")
    add("--dtype", help="float32, bfloat16 or float16; by default the model's own")
    add(
        "--mesh",
        default="-1,1",
        metavar="FSDP,TENSOR",
        help="how devices are laid out (default -1,1: all over the batch)",
    )
    add("--apply_chat_template", action="store_true", help="write the prompts with the tokenizer's chat template")
    add(
        "--fewshot_as_multiturn",
        action=argparse.BooleanOptionalAction,
        help="with a chat template: each example a turn of its own (the default) or all in one turn",
    )
    add(
        "--compilation_cache", default="~/.cache/selfplay_jax/xla", metavar="DIR", help="compiled programs; '' for none"
    )
    add("--output", metavar="FILE", help="where the results go as JSON")
    add("--log_samples", action="store_true", help="with --output: every prompt and answer too")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Evaluates what the options say and returns lm-eval's results.

    Raises:
      UserError: lm_eval is not installed, or an option names something that is not there.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-evaluation-harness is not installed: pip install 'selfplay_jax[eval]'")
    if options.log_samples and not options.output:
        raise UserError("--log_samples needs --output, the file that the samples go to")
    if options.fewshot_as_multiturn and not options.apply_chat_template:
        raise UserError("--fewshot_as_multiturn needs --apply_chat_template")
    if options.output and not os.path.isdir(os.path.dirname(os.path.abspath(options.output))):
        raise UserError(f"--output {options.output}: there is no such directory")
    if options.include_path and not os.path.isdir(options.include_path):
        raise UserError(f"--include_path {options.include_path} is no directory")
    if options.batch_size < 1 or (options.limit is not None and options.limit <= 0):
        raise UserError("--batch_size must be at least 1, --limit more than 0")
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from selfplay_jax.evaluation import load, suites

    # What costs little is checked first: reading lm-eval's task files takes 10 seconds, loading a large model minutes.
    entries = suites.expand(options.tasks)
    load.read_directory(options.model)
    manager = TaskManager(include_path=options.include_path)
    suites.check(entries, manager)
    lm, exact = _model(options)
    tasks = suites.load(entries, manager)
    with exact:
        return simple_evaluate(
            model=lm,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            batch_size=options.batch_size,
            log_samples=options.log_samples,
            apply_chat_template=options.apply_chat_template,
            fewshot_as_multiturn=options.apply_chat_template and options.fewshot_as_multiturn is not False,
        )


def _model(options: argparse.Namespace) -> tuple[Any, contextlib.AbstractContextManager[Any]]:
    """The adapter, and the float32 precision to run it under."""
    import jax

    from selfplay_jax import partitioning
    from selfplay_jax.data.templates import check_vocabulary, load_tokenizer
    from selfplay_jax.evaluation.harness import HarnessLM
    from selfplay_jax.evaluation.load import load_model

    if options.compilation_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(options.compilation_cache))
    try:
        fsdp, tensor = map(int, options.mesh.split(","))
    except ValueError:
        raise UserError(f"--mesh {options.mesh!r} must be two numbers, FSDP,TENSOR, e.g. -1,1") from None
    mesh = partitioning.make_mesh(fsdp, tensor)
    model, params, source = load_model(options.model, player=options.player, dtype=options.dtype, mesh=mesh)
    tokenizer = load_tokenizer(source)
    check_vocabulary(tokenizer, model.config.vocab_size)
    shardings = model.shardings(mesh, partitioning.DECODE_RULES)
    lm = HarnessLM(
        model,
        params,
        tokenizer,
        mesh=mesh,
        batch_size=options.batch_size,
        decode_params=jax.device_put(params, shardings),
    )
    exact = model.compute_dtype == "float32" and jax.default_backend() != "cpu"
    return lm, jax.default_matmul_precision("highest" if exact else None)


def report(results: dict[str, Any], output: str | None) -> None:
    """Prints lm-eval's tables; writes everything to `output`, whole or not at all."""
    from lm_eval.utils import handle_non_serializable, make_table

    from selfplay_jax import metrics

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))
    if output:
        metrics.write_text(output, json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False))
        print(f"results: {output}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leaves warnings and errors of lm-eval, datasets and the Hub's client; the progress lines are ours."""
    loggers = [
        logging.getLogger(name)
        for name in ("lm_eval", "datasets", "httpx", "huggingface_hub", "huggingface_hub.utils._http")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    options = parser().parse_args(argv)
    try:
        with _quiet():
            results = run(options)
            report(results, options.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
