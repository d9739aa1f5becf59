"""The experiment's fields and their defaults; `configs/METHOD.py` fills them, the command line overrides them.

A config is an `ml_collections.ConfigDict` whose fields are fixed here: a name that is not below is an error that
lists the near matches (`check`, called by main on what it read).
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

from ml_collections import ConfigDict

from selfplay_jax.errors import UserError

# Fields that may change between a run and its continuation: the numbers stay the same, but for rounding.
FREE_FIELDS = (
    "workdir",
    "rounds",
    "export",
    "export_dtype",
    "lora.export",
    "compilation_cache",
    "data.cache",
    "train.checkpoint_every",
    # What makes a run fit other devices: their layout, and the size of what is computed at a time.
    "mesh.replica",
    "mesh.fsdp",
    "mesh.tensor",
    "model.attention",
    "model.logits_chunk",
    "model.remat",
    "train.accumulate",
    "sampling.slots",
    "sampling.chunk",
    "sampling.sharded_weights",
    "scoring.batch_size",
    "evaluation.batch_size",
)


def base() -> ConfigDict:
    """Every field with its default: METHOD.md's choices, no model and no data yet."""
    return ConfigDict(
        {
            "method": "",  # sft, dpo, spin, tspin, tpaw: a row of methods.py
            "preset": "",
            "workdir": "",  # "" is runs/METHOD-PRESET
            "seed": 0,
            "rounds": 3,
            "window": 3,  # N_max: newest checkpoints kept as players, newest rounds that oppose
            "samples_per_prompt": 1,
            "opponents_per_prompt": 1,  # of each opposing round, per group
            "cut_responses": "keep",  # or "drop": whether responses cut at the length limit are trained on
            "by_round": "",  # e.g. "train.learning_rate=5e-7,1e-7;loss.lam=0.1,5": the last value stays
            "export": "final",  # none, final, best, every: Hugging Face directories under WORKDIR/hf
            "export_dtype": "",  # float32, bfloat16; "" is model.param_dtype
            "loss": {},  # the method's own fields, see methods.py
            "model": {
                "path": "builtin",  # a Hugging Face directory or hub name
                "compute_dtype": "float32",
                "param_dtype": "float32",
                "remat": "none",  # none, dots, full
                "logits_chunk": 32,
                "attention": "auto",  # plain, splash (the TPU's kernel); auto is splash on TPUs
            },
            "lora": {
                "rank": 0,  # 0: every parameter is trained; else only adapters of this rank on a frozen base
                "alpha": 16.0,  # the adapters' product is scaled by alpha / rank
                "targets": "q,k,v,o,gate,up,down",
                "export": "merged",  # or "peft": adapter_config.json and adapter_model.safetensors
            },
            "data": {
                "source": "builtin",  # files, a directory or glob of them, a hub name, tfds:NAME; see data/sources.py
                "split": "train",
                "columns": "",  # e.g. "prompt=instruction,response=output"; "" finds the usual names itself
                "turns": "last",  # which assistant turns of a dialogue are answers: last, first, all
                "examples": 0,  # records of a subset fixed by the seed; 0: all (of the built-in task: 100)
                "test": "",  # where the test examples come from; "" holds some of `source` back
                "test_split": "test",
                "test_examples": 500,
                "validation_examples": 200,  # held back from the training examples (built-in task: its own)
                "template": "auto",  # auto, chat, plain, alpaca, chatml, zephyr, llama3, or a Jinja file
                "max_prompt_tokens": 512,
                "max_response_tokens": 512,
                "overlong": "drop",  # or truncate
                "on_bad_record": "raise",  # or skip
                "tfds_dir": "",  # where tensorflow-datasets lie; "" is ~/tensorflow_datasets
                "cache": "~/.cache/selfplay_jax/data",  # tokenised examples; "" keeps none
            },
            "sft": {
                "epochs": 0,  # 0: the model is the SFT policy already
                "batch_size": 32,
                "learning_rate": 1e-4,
                "schedule": "constant",
                "warmup": 0.0,
            },
            "train": {
                "epochs": 1,  # per round
                "batch_size": 32,  # prompts per step
                "accumulate": 1,  # microbatches per step
                "optimizer": "adamw",  # adamw, rmsprop, adafactor
                "b1": 0.9,
                "b2": 0.999,
                "eps": 1e-8,
                "decay": 0.99,  # rmsprop's
                "weight_decay": 0.0,
                "clip_norm": 1.0,  # 0: off
                "learning_rate": 1e-5,
                "schedule": "constant",  # constant, linear, cosine
                "warmup": 0.0,  # share of the round's steps
                "checkpoint_every": 200,  # steps between saves inside a round
            },
            "sampling": {
                "temperature": 1.0,
                "top_k": 0,
                "top_p": 1.0,
                "max_new_tokens": 256,
                "slots": 64,  # responses decoded together
                "chunk": 512,  # prompts between two saves
                "sharded_weights": False,  # True: decode with the training layout (a model too large for whole columns)
            },
            "scoring": {
                "batch_size": 64,  # prompts per forward pass
                "chunk": 4096,  # prompts between two saves
            },
            "evaluation": {
                "every": 1,  # rounds; 0: never
                "run": "greedy,sampled,likelihood",  # see evaluation/evaluate.py; "greedy:200" takes 200 examples
                "answer": r"#\s*(-?[\d,]+(?:\.\d+)?)",  # the last match of the first group is compared
                "samples_per_prompt": 4,  # of "sampled", at temperature 1
                "shots": 5,  # of "gsm8k"
                "lm_eval_path": "",  # a directory of more task files for "lm_eval/TASK"
                "batch_size": 128,
                "select": "target_logp",  # or "sampled_accuracy": what "best" means, on the validation examples
            },
            "mesh": {"replica": 1, "fsdp": -1, "tensor": 1},  # sizes; -1: the devices that are left
            "compilation_cache": "~/.cache/selfplay_jax/xla",  # "" turns it off
        }
    )


Preset = Callable[[ConfigDict], None]


def build(method: str, loss: Mapping[str, Any], presets: Mapping[str, Preset], name: str | None) -> ConfigDict:
    """The config of one method at one scale: what `get_config` of a file in configs/ returns.

    Args:
      method: a row of `methods.py`.
      loss: the method's own fields with their defaults.
      presets: by name, functions that fill a base config; "demo" is the default.
      name: what followed the colon of `--config=file.py:name`; None or "" is "demo".
    Raises:
      UserError: no preset of that name.
    """
    name = name or "demo"
    if name not in presets:
        raise UserError(f"{method} has no preset '{name}'{_near(name, presets)}; it has {', '.join(presets)}.")
    config = base().lock()  # before the preset fills it: a field that it misspells is an error
    config.method, config.preset, config.loss = method, name, ConfigDict(dict(loss)).lock()
    presets[name](config)
    return config


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f" (did you mean {' or '.join(close)}?)" if close else ""


def flat(config: ConfigDict | Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The config's leaves by dotted name."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, (ConfigDict, dict)):
            leaves.update(flat(value, f"{name}."))
        else:
            leaves[name] = value
    return leaves


def unknown_field(name: str, config: ConfigDict) -> UserError:
    """The error for an override of a field that does not exist."""
    if isinstance(config.get(name), ConfigDict):
        fields = ", ".join(f"config.{name}.{field}" for field in config[name])
        return UserError(f"config.{name} is a section, not a field; it has {fields or 'no fields'}.")
    names = [*flat(config), *(key for key, value in config.items() if isinstance(value, ConfigDict))]
    tails = [field for field in names if field.split(".")[-1] == name.split(".")[-1]]
    close = tails or difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join('config.' + field for field in close[:3])}?" if close else "."
    return UserError(f"the config has no field '{name}'{hint}")


_CHOICES = {
    "cut_responses": ("keep", "drop"),
    "export": ("none", "final", "best", "every"),
    "export_dtype": ("", "float32", "bfloat16"),
    "lora.export": ("merged", "peft"),
    "model.remat": ("none", "dots", "full"),
    "model.attention": ("auto", "plain", "splash"),
    "model.compute_dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "data.turns": ("last", "first", "all"),
    "data.overlong": ("drop", "truncate"),
    "data.on_bad_record": ("raise", "skip"),
    "train.optimizer": ("adamw", "rmsprop", "adafactor"),
    "train.schedule": ("constant", "linear", "cosine"),
    "sft.schedule": ("constant", "linear", "cosine"),
    "evaluation.select": ("target_logp", "sampled_accuracy"),
}
_AT_LEAST_ONE = (
    "window", "samples_per_prompt", "opponents_per_prompt", "evaluation.samples_per_prompt", "sft.batch_size",
    "train.epochs", "train.batch_size", "train.accumulate", "train.checkpoint_every", "sampling.max_new_tokens",
    "sampling.slots", "sampling.chunk", "scoring.batch_size", "scoring.chunk", "evaluation.batch_size",
    "model.logits_chunk", "data.max_prompt_tokens", "data.max_response_tokens",
)  # fmt: skip
_NOT_NEGATIVE = ("rounds", "seed", "sft.epochs", "data.examples", "data.test_examples", "data.validation_examples",
                 "evaluation.every", "evaluation.shots", "sampling.temperature", "sampling.top_k", "lora.rank",
                 "train.learning_rate", "sft.learning_rate", "train.clip_norm")  # fmt: skip


def check(config: ConfigDict) -> None:
    """Raises a UserError that names the first field whose value cannot work."""
    if config.by_round:
        for round_index in range(max(len(values) for values in _by_round(config).values())):
            changed = of_round(config, round_index)
            changed.by_round = ""
            check(changed)
    values = flat(config)
    for name, choices in _CHOICES.items():
        if values[name] not in choices:
            raise UserError(
                f"config.{name}={values[name]!r} is not one of {', '.join(choices)}{_near(str(values[name]), choices)}."
            )
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"config.{name}={value} must be a finite number.")
    for names, least in ((_AT_LEAST_ONE, 1), (_NOT_NEGATIVE, 0)):
        for name in names:
            if values[name] < least:
                raise UserError(f"config.{name}={values[name]} must be at least {least}.")
    if values["opponents_per_prompt"] > values["samples_per_prompt"]:
        raise UserError(
            f"config.opponents_per_prompt={values['opponents_per_prompt']} must not exceed "
            f"config.samples_per_prompt={values['samples_per_prompt']}: a group takes its opponents from the samples."
        )
    if values["seed"] >= 2**31:
        raise UserError(f"config.seed={values['seed']} must be below 2^31.")
    if not 0 < values["sampling.top_p"] <= 1:
        raise UserError(f"config.sampling.top_p={values['sampling.top_p']} must be in (0, 1].")
    for name in ("train", "sft"):
        if not 0 <= values[f"{name}.warmup"] < 1:
            raise UserError(f"config.{name}.warmup={values[f'{name}.warmup']} is a share of the steps: 0 to 1.")
    if values["train.batch_size"] % values["train.accumulate"]:
        raise UserError(
            f"config.train.accumulate={values['train.accumulate']} must divide "
            f"config.train.batch_size={values['train.batch_size']}."
        )


_BY_ROUND_SECTIONS = ("loss", "train", "sampling")


def of_round(config: ConfigDict, round_index: int) -> ConfigDict:
    """The config with the values that `by_round` gives to a round; past the last value, the last.

    Raises:
      UserError: `by_round` does not read like "train.learning_rate=5e-7,1e-7;loss.lam=0.1,5", names a field that is not
        there or not in loss, train or sampling, or has a value of another type.
    """
    changed = config.copy_and_resolve_references()
    for name, values in _by_round(config).items():
        section, field = name.split(".")
        changed[section][field] = values[min(round_index, len(values) - 1)]
    return changed


def _by_round(config: ConfigDict) -> dict[str, list[Any]]:
    fields: dict[str, list[Any]] = {}
    for part in filter(None, (part.strip() for part in config.by_round.split(";"))):
        name, equals, texts = part.partition("=")
        name = name.strip()
        section, _, field = name.partition(".")
        if not equals or section not in _BY_ROUND_SECTIONS:
            raise UserError(
                f"config.by_round has {part!r}; it reads like train.learning_rate=5e-7,1e-7;loss.lam=0.1,5, with "
                f"fields of {', '.join(_BY_ROUND_SECTIONS)}."
            )
        if name in fields:
            raise UserError(f"config.by_round names {name} twice.")
        if field not in config[section]:
            raise UserError(f"config.by_round: {name!r} is no field{_near(field, config[section])}.")
        like = type(config[section][field])
        try:
            fields[name] = [_as(like, text.strip()) for text in texts.split(",")]
        except ValueError:
            raise UserError(f"config.by_round: {name} takes values of type {like.__name__}, not {texts!r}.") from None
    return fields


def _as(like: type, text: str) -> Any:
    if like is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    return like(text)


def difference(old: Mapping[str, Any], new: ConfigDict) -> str | None:
    """Says which field of a workdir's recorded config differs from `new`, None where the run may go on."""
    before, after = flat(old), flat(json.loads(new.to_json()))
    for name in sorted(before.keys() | after.keys(), key=lambda name: (name != "method", name)):
        if name in FREE_FIELDS:
            continue
        if before.get(name) != after.get(name):
            return f"config.{name} is {before.get(name)!r} there and {after.get(name)!r} here"
    return None
