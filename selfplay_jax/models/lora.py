"""Low-rank adapters as trees: apart from their base, joined with it, merged into it, and in PEFT's files."""

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath

from selfplay_jax import distributed
from selfplay_jax.errors import UserError
from selfplay_jax.models.config import PROJECTIONS, Lora
from selfplay_jax.models.hf_directory import rebuilt
from selfplay_jax.models.hf_tensors import tensors

if TYPE_CHECKING:
    from selfplay_jax.models.decoder import Model

Tree = dict[str, Any]

_NAMES = ("lora_a", "lora_b")
_PREFIX = "base_model.model."
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def of_config(fields: Mapping[str, Any]) -> Lora | None:
    """What the `lora` fields of a config ask for, None for rank 0.

    Raises:
      UserError: a target that is no projection, or none at all.
    """
    if fields["rank"] == 0:
        return None
    names = tuple(name.strip() for name in fields["targets"].split(",") if name.strip())
    unknown = [name for name in names if name not in PROJECTIONS]
    if unknown or not names:
        wrong = f"has {unknown[0]!r}" if unknown else "is empty"
        raise UserError(f"config.lora.targets {wrong}; it is a list, with commas, of {', '.join(PROJECTIONS)}.")
    return Lora(fields["rank"], fields["alpha"], tuple(name for name in PROJECTIONS if name in names))


def centred_uniform(bound: float) -> Any:
    """An initializer that draws uniformly from (-bound, bound)."""
    uniform = jax.nn.initializers.uniform(2 * bound)
    return lambda key, shape, dtype: uniform(key, shape, dtype) - bound


def split(tree: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """(adapters, base) of a tree like the parameters."""
    ours: Tree = {}
    base: Tree = {}
    for key, value in tree.items():
        if key in _NAMES:
            ours[key] = value
        elif isinstance(value, Mapping):
            inner, rest = split(value)
            if inner:
                ours[key] = inner
            if rest:
                base[key] = rest
        else:
            base[key] = value
    return ours, base


def join(one: Mapping[str, Any], other: Mapping[str, Any]) -> Tree:
    """Both trees in one; no leaf is in both."""
    both: Tree = dict(one)
    for key, value in other.items():
        both[key] = join(both[key], value) if key in both else value
    return both


def merge(model: "Model", params: Tree) -> tuple["Model", Tree]:
    """The plain model that computes the same: kernels W + scale A B, in W's dtype. Without LoRA, what was given."""
    if model.lora is None:
        return model, params
    plain = dataclasses.replace(model, lora=None)
    return plain, _merged(model.lora.scale, params)


# One program for the whole tree; the sums are made in float32.
@jax.jit
def _merged(scale: float, params: Tree) -> Tree:
    layers = {}
    for name, projection in params["layers"].items():
        if "lora_a" in projection:
            a, b = projection["lora_a"], projection["lora_b"]
            # vmap over the layers; A's last dimension meets B's first.
            delta = scale * jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(a, b)
            kernel = projection["kernel"]
            projection = {**projection, "kernel": (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)}
            projection = {key: value for key, value in projection.items() if key not in _NAMES}
        layers[name] = projection
    return {**params, "layers": layers}


def save_peft(path: epath.PathLike, model: "Model", params: Tree, *, base: str) -> None:
    """Writes the adapters as a directory that `peft.PeftModel.from_pretrained(base_model, path)` loads.

    Args:
      path: the directory, here or on gs:// or s3://; an earlier export there is replaced, as a whole.
      params: the parameter tree, or the adapters alone.
      base: the name or path of the base model, recorded for people and for `peft.AutoPeftModel`.

    Raises:
      UserError: the model has no adapters, or the directory cannot be written.
    """
    if model.lora is None:
        raise UserError("only a model with adapters (config.lora.rank above 0) can be exported in PEFT's format.")
    modules = _modules(model)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": model.lora.rank,
        "lora_alpha": model.lora.alpha,
        "target_modules": sorted({names[0].rsplit(".", 1)[-1] for names in modules.values()}),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    arrays: dict[str, np.ndarray] = {}
    for name, places in modules.items():
        a, b = (np.asarray(distributed.to_host(params["layers"][name][key]), np.float32) for key in _NAMES)
        for layer, place in enumerate(places):
            rank = model.lora.rank
            arrays[f"{_PREFIX}{place}.lora_A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, rank).T)
            arrays[f"{_PREFIX}{place}.lora_B.weight"] = np.ascontiguousarray(b[layer].reshape(rank, -1).T)

    def write() -> None:
        with rebuilt(path, "the adapters", ADAPTER_CONFIG) as partial:
            (partial / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
            safetensors.numpy.save_file(arrays, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})

    distributed.agree(write)


def _modules(model: "Model") -> dict[str, list[str]]:
    """By adapted projection its modules in transformers' tree, a name per layer: model.layers.0.self_attn.q_proj."""
    assert model.lora is not None
    kernels = {entry.path: entry.names for entry in tensors(model.config)}
    return {
        name: [weight.removesuffix(".weight") for weight in kernels["layers", name, "kernel"]]
        for name in model.lora.targets
    }
