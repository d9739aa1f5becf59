"""TPU slices by the names that Cloud TPU gives them, what their chips can do, and the compiler's devices for them."""

import contextlib
import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Mapping
from typing import Any

from selfplay_jax.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One JAX device of a TPU generation: a chip, or half a chip on tpu7x, whose two cores are two devices.

    devices: JAX devices per chip. dimensions: of the torus. cores: TensorCores per chip where slice names count them,
    else 0. peak_flops: bfloat16 per second and device. hbm_bytes: what the compiler lets a program use. The bandwidths
    are bytes per second and device, ici and dcn in one direction over all links. clock: Hz.
    """

    name: str
    devices: int
    dimensions: int
    cores: int
    peak_flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    ici_bandwidth: float
    dcn_bandwidth: float
    clock: float


# Peak, HBM, ICI and DCN: the tables of docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, read in 2026; ICI's
# figures for both directions halved; v5e's DCN is its pod's divided by 256 chips. v4's ICI: six links of 50 GB/s (arXiv
# 2304.01433); its DCN: taken to be v5p's. Usable HBM: what libtpu 0.0.52 says when a program exceeds it ("exceeds
# available HBM (15.75G)"). Clock: peak / flops per cycle of the matrix units (in units of 128x128: v4 and v5p 8, v5e 4,
# v6e and each core of tpu7x 16).
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1, 3, 2, 275e12, 30.75 * GIB, 1200e9, 300e9, 6.25e9, 1.05e9),
        Chip("v5e", 1, 2, 0, 197e12, 15.75 * GIB, 819e9, 200e9, 3.125e9, 1.5e9),
        Chip("v5p", 1, 3, 2, 459e12, 95.73 * GIB, 2765e9, 600e9, 6.25e9, 1.75e9),
        Chip("v6e", 1, 2, 0, 918e12, 31.24 * GIB, 1638e9, 400e9, 12.5e9, 1.75e9),
        Chip("tpu7x", 2, 3, 0, 1153.5e12, 94.74 * GIB, 3690e9, 300e9, 6.25e9, 2.2e9),
    )
}

# Chips -> the shape that a slice of so many has (those pages' tables).
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8",
    1024: "8x8x16", 2048: "8x16x16", 4096: "16x16x16", 6144: "16x16x24",
}  # fmt: skip
_LARGEST_V4 = 2048

_ALIASES = {"v5litepod": "v5e", "v5lite": "v5e"}
_SPELLINGS = {"v5e": "v5litepod"}


def slice_names() -> dict[str, str]:
    """Slice name -> topology name, for all that Cloud TPU names: v5litepod-16 -> v5e:4x4, v5p-16 -> v5p:2x2x2."""
    names = {}
    for chip in CHIPS.values():
        if chip.name == "tpu7x":  # sold by topology alone
            continue
        for chips, shape in (_CUBES if chip.dimensions == 3 else _FLAT).items():
            if chip.name != "v4" or chips <= _LARGEST_V4:
                count = chips * chip.cores if chip.cores else chips
                names[f"{_SPELLINGS.get(chip.name, chip.name)}-{count}"] = f"{chip.name}:{shape}"
    return names


@dataclasses.dataclass(frozen=True)
class Slice:
    """What is to be rented: `slices` equal slices of `chip`s, each a torus of `shape`. `name` is the user's word."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def topology(self) -> str:
        """The name that the compiler knows, such as v5e:4x4 (of one slice)."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def one_host(self) -> "Slice":
        """The chips of one machine, as a slice."""
        if self.hosts == self.slices:
            return dataclasses.replace(self, slices=1)
        return dataclasses.replace(self, shape=(2, 2, 1)[: self.chip.dimensions], slices=1)

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """JAX devices of all slices."""
        return self.chips * self.chip.devices

    @property
    def hosts(self) -> int:
        """Machines: four chips each, or up to eight chips of a small flat slice in one."""
        chips = math.prod(self.shape)
        return self.slices * (1 if chips <= 4 or (chips == 8 and self.chip.dimensions == 2) else chips // 4)


def find(name: str, slices: int = 1) -> Slice:
    """The slice of a name: v5litepod-16, v5e-16, v5p-8 (counts TensorCores, as Cloud TPU does), v5p:2x2x2, 2xv5p-256.

    Raises:
      UserError: no such slice; near matches are named.
    """
    word = name.strip().lower()
    several = re.fullmatch(r"(\d+)x([a-z].*)", word)
    if several:
        slices, word = slices * int(several.group(1)), several.group(2)
    if slices < 1:
        raise UserError(f"--topology={name}: there must be one slice at least.")
    kind, _, rest = re.sub(r"[-:]", " ", word, count=1).partition(" ")
    kind = _ALIASES.get(kind, kind)
    known = slice_names()
    if ":" in word and kind in CHIPS:
        chip = CHIPS[kind]
        if re.fullmatch("x".join([r"[1-9]\d*"] * chip.dimensions), rest):
            return Slice(name, chip, tuple(int(size) for size in rest.split("x")), slices)
        like = known[_near_shape(kind, known)]
        raise UserError(f"--topology={name}: a {kind} topology has {chip.dimensions} sizes, as in {like}.")
    topology = known.get(f"{_SPELLINGS.get(kind, kind)}-{rest}")
    if topology is None:
        raise UserError(f"--topology={name} is no TPU slice{_suggestion(kind, rest, known)}")
    chip_name, _, shape = topology.partition(":")
    return Slice(name, CHIPS[chip_name], tuple(int(size) for size in shape.split("x")), slices)


def _near_shape(kind: str, known: Mapping[str, str]) -> str:
    return next((name for name, topology in known.items() if topology.startswith(kind)), "v5p-16")


def _suggestion(kind: str, rest: str, known: Mapping[str, str]) -> str:
    of_kind = [name for name in known if known[name].startswith(f"{kind}:")]
    if kind == "tpu7x":
        return ": tpu7x slices are named by their topology, as in tpu7x:2x2x1."
    if of_kind:
        counted = " (the number counts TensorCores, two a chip)" if CHIPS[kind].cores else " (the number counts chips)"
        return f"; of {kind} there are {', '.join(of_kind)}{counted}, or a topology such as {known[of_kind[1]]}."
    close = difflib.get_close_matches(f"{kind}-{rest}", list(known), n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return f"{hint} Generations are {', '.join(CHIPS)}; a name is like v5litepod-16, v5p-16, v6e-8, v4-32 or v5e:4x4."


def check_compiler() -> None:
    """Raises a UserError when libtpu, the compiler, is not installed."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "preflight compiles with the TPU compiler, libtpu, which is not installed here (it needs no TPU): "
            'pip install "selfplay_jax[tpu]", or in a checkout make setup TPU=1.'
        )


def environment() -> dict[str, str]:
    """The environment of a process that compiles: CPU only, next to other such processes, asking no metadata server."""
    kept = {
        key: value for key, value in os.environ.items() if key != "XLA_FLAGS"
    }  # libtpu may not know the CPU's flags
    return kept | {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any: it keeps libtpu from asking
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }


def devices(wanted: Slice) -> list[Any]:
    """The compiler's devices for a slice; call it in a process with `environment()`.

    Raises:
      UserError: the compiler knows no such topology.
    """
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    if wanted.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores are one device, as they are on a real v4
    if wanted.slices > 1:
        options["num_slices"] = wanted.slices
    if wanted.chip.dimensions == 2 and math.prod(wanted.shape) == 8:
        options["chips_per_host_bounds"] = [*wanted.shape, 1]
    with contextlib.suppress(ImportError):
        try:
            description = topologies.get_topology_desc(platform="tpu", topology_name=wanted.topology, **options)
            return list(description.devices)
        except Exception as error:  # what libtpu raises has no type of its own
            raise UserError(
                f"--topology={wanted.name}: the TPU compiler knows no topology {wanted.topology} ({_first(error)})."
            ) from error
    raise UserError("this version of JAX has no jax.experimental.topologies; preflight needs it.")


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
