"""Floating-point operations of a program's matrix products, counted in its jaxpr, scanned layers and all.

XLA's own `cost_analysis` counts the body of a loop once, whatever its length: useless for scanned layers.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any


@dataclasses.dataclass(frozen=True)
class Flops:
    """Operations of all devices together; `pallas` is the part inside Pallas kernels, counted over their whole grid."""

    total: float = 0.0
    pallas: float = 0.0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.total + other.total, self.pallas + other.pallas)

    def times(self, factor: float) -> "Flops":
        """The same program run `factor` times."""
        return Flops(self.total * factor, self.pallas * factor)


def count(jaxpr: Any) -> Flops:
    """Matrix products of a jaxpr: two operations per multiply-add.

    The body of a scan counts once per iteration. That of a while loop counts once: its length is not known. Of a
    conditional the dearest branch counts.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    result = Flops()
    for equation in jaxpr.eqns:
        result = result + _equation(equation)
    return result


def _equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return Flops(_dot(equation))
    if name == "cond":
        return max((count(branch) for branch in params["branches"]), key=lambda flops: flops.total)
    inner = Flops()
    for jaxpr in _inner(params):
        inner = inner + count(jaxpr)
    if name == "scan":
        return inner.times(params["length"])
    if name == "shard_map":  # its shapes are one device's
        return inner.times(_devices(params))
    if name == "pallas_call":
        grid = [size for size in params["grid_mapping"].grid if isinstance(size, int)]
        whole = inner.times(math.prod(grid)).total
        return Flops(whole, whole)
    return inner


def _dot(equation: Any) -> float:
    (contracting, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracting)


def _devices(params: dict[str, Any]) -> int:
    mesh = params["mesh"]
    # JAX's own name for the axes that the shapes inside are one device's part of; versions differ.
    manual = params.get("newly_manual_axes", params.get("manual_axes", mesh.axis_names))
    return math.prod(size for name, size in zip(mesh.axis_names, mesh.axis_sizes, strict=True) if name in manual)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
