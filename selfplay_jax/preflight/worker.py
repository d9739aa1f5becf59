"""The process that compiles: reads a request on stdin, writes one line of JSON per stage of each program on stdout.

A process of its own, because the TPU compiler may abort on a program, and what it aborts must not be the report.
"""

import json
import os
import pathlib
import sys
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from selfplay_jax import layout, partitioning
from selfplay_jax.errors import UserError
from selfplay_jax.models import ModelConfig, RopeScaling
from selfplay_jax.preflight import hlo, programs, topologies

_MOST_TEXT = 2000  # characters kept of a compiler's message


def main() -> int:
    """Compiles what stdin asks for: {"config", "shape", "topology", "slices", "programs", "folder"}."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed is noise
    request = json.load(sys.stdin)

    def tell(program: str, stage: str, **fields: Any) -> None:
        lines.write(json.dumps({"program": program, "stage": stage, **fields}) + "\n")

    try:
        config, shape = ConfigDict(request["config"]), read_shape(request["shape"])
        wanted = topologies.find(request["topology"], request["slices"])
        devices = topologies.devices(wanted)
        mesh = partitioning.make_mesh(config.mesh.fsdp, config.mesh.tensor, devices, replica=config.mesh.replica)
    except UserError as error:
        tell("", "refused", message=str(error))
        return 0
    # As in selfplay.play: float32 games multiply in float32 on accelerators too.
    precision = "highest" if config.model.compute_dtype == "float32" else None
    host = None
    if programs.samples_alone(config, mesh):
        host = partitioning.make_mesh(-1, mesh.shape["tensor"], topologies.devices(wanted.one_host))
    notes = layout.notes(config, programs.make_model(config, shape), mesh)
    for name in request["programs"]:
        tell(name, "started")
        program = programs.build(config, shape, mesh, name, host)
        slices = wanted.slices if program.copies == 1 else 1
        with jax.default_matmul_precision(precision):
            _compile(program, slices, notes, f"{request['folder']}/{name}", tell)
    return 0


def _compile(program: programs.Program, slices: int, notes: list[str], folder: str, tell: Any) -> None:
    mesh = program.mesh
    counted = programs.count(program.jitted, program.arguments, mesh)
    tell(
        program.name, "traced",
        flops=counted.total, pallas_flops=counted.pallas, model_flops=program.model_flops(),
        holds=program.holds, beside=program.beside, rows=program.rows, tokens=program.tokens,
        mesh=dict(mesh.shape), copies=program.copies, notes=notes,
    )  # fmt: skip
    began = time.perf_counter()
    try:
        with partitioning.use_mesh(mesh):
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            compiled = program.jitted.trace(*program.arguments).lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        tell(program.name, "failed", message=str(error)[:_MOST_TEXT], seconds=time.perf_counter() - began)
        return
    memory = compiled.memory_analysis()
    tell(
        program.name, "compiled", seconds=time.perf_counter() - began,
        memory={
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
        },
    )  # fmt: skip
    # `as_text()` fails on programs with some asynchronous collectives; what the compiler itself wrote down is the same.
    texts = list(pathlib.Path(folder).glob("*after_codegen.txt"))
    text = max(texts, key=lambda path: path.stat().st_size).read_text() if texts else compiled.as_text()
    once, repeated = hlo.read(text, devices=mesh.size // slices, slices=slices)
    tell(program.name, "read", once=vars(once), repeated=vars(repeated))


def read_shape(fields: dict[str, Any]) -> ModelConfig:
    """A ModelConfig from JSON."""
    scaling = fields["rope_scaling"]
    changed = {"rope_scaling": RopeScaling(**scaling) if scaling else None, "stop_ids": tuple(fields["stop_ids"])}
    return ModelConfig(**{**fields, **changed})


if __name__ == "__main__":
    sys.exit(main())
