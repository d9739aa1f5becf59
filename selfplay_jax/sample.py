"""A model's answers to a file of prompts.

    python -m selfplay_jax.sample --model DIR --prompts prompts.jsonl --output answers.jsonl

DIR is a Hugging Face directory or a run's workdir. Prompts are anything that training data may be, without the answers.
Exit codes: 0 done, 1 a user's error (one sentence on stderr).
"""

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from selfplay_jax.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    options = argparse.ArgumentParser(
        prog="python -m selfplay_jax.sample", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add("--model", required=True, metavar="DIR", help="a Hugging Face directory, or a run's workdir")
    add("--player", help="of a workdir: a player's number, best or final (default final)")
    add("--prompts", required=True, metavar="SOURCE", help="a file, a directory, a hub or tensorflow-datasets name")
    add("--split", default="train", help="of a dataset (default train)")
    add("--column", default="", help="the column of prompts or messages, where its name is not a usual one")
    add("--limit", type=int, default=0, help="at most so many prompts, drawn by the seed")
    add("--template", help="as config.data.template (default: the run's own, or auto)")
    add("--on_bad_record", default="raise", help="or skip: what to do with a prompt that cannot be read")
    add("--output", required=True, metavar="FILE", help="where the answers go, a JSON object per line")
    add("--samples", type=int, default=1, help="answers per prompt (default 1)")
    add("--temperature", type=float, default=1.0, help="0 is greedy (default 1)")
    add("--top_k", type=int, default=0, help="0 keeps all (the default)")
    add("--top_p", type=float, default=1.0, help="1 keeps all (the default)")
    add("--max_new_tokens", type=int, default=256, help="answers are cut there (default 256)")
    add("--seed", type=int, default=0)
    add("--slots", type=int, default=64, help="answers decoded together (default 64)")
    add("--dtype", help="float32 or bfloat16; by default the model's own")
    return options


def run(options: argparse.Namespace) -> None:
    """Samples and writes what the options say.

    Raises:
      UserError: an option names something that is not there, or is out of range.
    """
    import jax

    from selfplay_jax import metrics, partitioning
    from selfplay_jax.data.sources import load_prompts
    from selfplay_jax.data.templates import Template, check_vocabulary, load_tokenizer
    from selfplay_jax.evaluation.load import load_model, read_directory
    from selfplay_jax.progress import progress, say
    from selfplay_jax.sampling import generate

    _check(options)
    columns = {"prompt": options.column} if options.column else None
    prompts, _ = load_prompts(
        options.prompts, split=options.split, columns=columns, limit=options.limit, seed=options.seed,
        on_bad_record=options.on_bad_record,
    )  # fmt: skip
    mesh = partitioning.make_mesh()
    model, params, source = load_model(options.model, player=options.player, dtype=options.dtype, mesh=mesh)
    tokenizer = load_tokenizer(source)
    check_vocabulary(tokenizer, model.config.vocab_size)
    own = read_directory(options.model).get("data", {}).get("template", "auto")
    template = Template.from_tokenizer(tokenizer, options.template or own, stop_ids=model.config.stop_ids)
    texts = [template.render_prompt(prompt.messages) for prompt in prompts]
    shardings = model.shardings(mesh, partitioning.DECODE_RULES)
    with progress("sampling", total=len(prompts) * options.samples, unit="responses") as bar:
        try:
            samples = generate(
                model,
                jax.device_put(params, shardings),
                template.encode_prompt_texts(texts),
                seed=options.seed,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                max_new_tokens=options.max_new_tokens,
                stop_ids=template.stop_ids,
                prompt_ids=[prompt.id for prompt in prompts],
                samples_per_prompt=options.samples,
                slots=options.slots,
                mesh=mesh,
                on_progress=bar.advance,
            )
        except ValueError as error:
            raise UserError(f"these prompts cannot be sampled so: {error}.") from error
    rows = []
    for i, tokens in enumerate(samples.tokens):
        prompt, copy = divmod(i, options.samples)
        row: dict[str, Any] = {"id": prompts[prompt].id, "sample": copy, "prompt": texts[prompt]}
        row |= {"response": template.decode(tokens), "tokens": len(tokens), "finished": bool(samples.finished[i])}
        logp = float(samples.logps[i])
        row["logp"] = logp if math.isfinite(logp) else None
        rows.append(json.dumps(row, ensure_ascii=False) + "\n")
    metrics.write_text(options.output, "".join(rows))
    finished = f"{100 * samples.finished.mean():.0f} % finished"
    say(f"{len(rows)} answers to {len(prompts)} prompts, template '{template.kind}', {finished}: {options.output}")


def _check(options: argparse.Namespace) -> None:
    """Raises a UserError for what would only show after the model was loaded, or after the sampling."""
    for name, least in (("limit", 0), ("seed", 0), ("samples", 1), ("max_new_tokens", 1), ("slots", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name} {getattr(options, name)} must be at least {least}")
    if not pathlib.Path(options.output).absolute().parent.is_dir():
        raise UserError(f"--output {options.output}: there is no such directory")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = parser().parse_args(argv)
    try:
        run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
