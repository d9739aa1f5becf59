"""How fast does a model directory load and save, and how much host memory does it take?

    python benchmarks/loading.py [--megabytes=500] [--devices=1] [--dtype=bfloat16] [--json]

Writes a random Llama of that many megabytes of float32 parameters (32 layers) as files of `--dtype` in ten shards, then
loads and saves it in a fresh process, twice: the first time compiles, the second is measured. Beside each other: the
seconds and MB/s of `load_hf`, of `save_hf` and, as the roofline, of `safetensors.numpy.load_file` on the same files
(from the page cache: they have just been written); the peak of anonymous host memory above the process's own before
loading, as a ratio to the bytes of the parameters; and what of that peak is not parameters, against its bound: one
shard and one layer. On the CPU backend the parameters themselves are host memory and are subtracted; on an
accelerator nothing is. With `--devices` above 1 the CPU is cut into so many, and the parameters over them.
"""

import argparse
import gc
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

LAYERS, SHARDS = 32, 10


def build(directory: pathlib.Path, megabytes: float, dtype: str) -> None:
    """A random Llama of `megabytes` of float32 parameters, as files of `dtype`."""
    import jax
    import numpy as np

    from selfplay_jax.models import Model, ModelConfig, save_hf

    # A layer has 15 hidden² parameters: q and o 1 each, k and v ½ each, gate, up and down 4 each.
    hidden = max(64, round((megabytes * 1e6 / 4 / LAYERS / 15) ** 0.5 / 64) * 64)
    config = ModelConfig("llama", 2048, hidden, 4 * hidden, LAYERS, hidden // 32, hidden // 64, 32)
    model = Model(config, param_dtype=dtype)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.random(leaf.shape, np.float32), model.abstract_params())
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(model.abstract_params()))
    save_hf(directory, model, params, max_shard_bytes=size / SHARDS)


class Peak:
    """The highest anonymous memory of this process while the block runs, in bytes; `before` it, and the `seconds`."""

    def __enter__(self) -> "Peak":
        gc.collect()
        self.before = self.highest = _anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._began
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.highest = max(self.highest, _anonymous())


def _anonymous() -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measure(directory: pathlib.Path) -> dict[str, Any]:
    """Seconds and bytes of loading and saving `directory`, everything compiled before."""
    import jax
    import safetensors.numpy

    from selfplay_jax import partitioning
    from selfplay_jax.models import Model, load_hf, read_config, save_hf
    from selfplay_jax.models.hf_tensors import tensors

    model = Model(read_config(directory))
    shardings = None
    if jax.device_count() > 1:
        shardings = model.shardings(partitioning.make_mesh(-1, 2))
    files = sorted(directory.glob("*.safetensors"))
    out = directory.parent / "saved"

    largest = max(file.stat().st_size for file in files)
    dtype = json.loads((directory / "config.json").read_text())["dtype"]

    def save(params: Any) -> None:  # the same files again, so that both directions have the same bound
        save_hf(out, model, params, max_shard_bytes=largest, dtype=dtype)

    began = time.perf_counter()
    _, params = load_hf(directory, shardings=shardings)
    cold = time.perf_counter() - began
    save(params)
    del params
    with Peak() as load:
        _, params = load_hf(directory, shardings=shardings)
    on_host = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    on_host *= jax.default_backend() == "cpu"
    with Peak() as save_peak:
        save(params)
    del params
    with Peak() as plain:
        _read_plainly(files, safetensors.numpy.load_file)
    file_bytes = sum(file.stat().st_size for file in files)
    layer = sum(4 * leaf.size for leaf in jax.tree.leaves(model.abstract_params()["layers"])) // LAYERS
    parameters = sum(4 * leaf.size for leaf in jax.tree.leaves(model.abstract_params()))
    stacked = max(4 * math.prod(entry.full_shape) for entry in tensors(model.config) if entry.stacked)
    return {
        "device": jax.devices()[0].device_kind, "devices": jax.device_count(), "parameter_bytes": parameters,
        "file_bytes": file_bytes, "bound_bytes": largest + layer, "largest_stacked_bytes": stacked,
        "load": _row(load, file_bytes, parameters, load.highest - load.before - on_host),
        "save": _row(save_peak, file_bytes, parameters, save_peak.highest - save_peak.before, held=on_host),
        "plain_read": {"seconds": plain.seconds, "MB/s": file_bytes / plain.seconds / 1e6},
        "first_load_seconds": cold,
    }  # fmt: skip


def _row(peak: Peak, file_bytes: int, parameters: int, extra: int, held: int = 0) -> dict[str, float]:
    above = peak.highest - peak.before + held
    return {
        "seconds": peak.seconds,
        "MB/s": file_bytes / peak.seconds / 1e6,
        "peak_to_parameters": above / parameters,
        "beside_parameters_bytes": extra,
    }


def _read_plainly(files: list[pathlib.Path], read: Callable[[pathlib.Path], Any]) -> None:
    for file in files:
        read(file)


def _child(options: argparse.Namespace, directory: pathlib.Path) -> dict[str, Any]:
    """`measure` in a fresh process whose allocator gives freed arrays back at once."""
    environment = dict(os.environ)
    environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    if options.devices > 1:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
        environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    done = subprocess.run(
        [sys.executable, __file__, f"--measure={directory}"], env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Builds the model, measures in a child process, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=float, default=500, help="of float32 parameters")
    parser.add_argument("--devices", type=int, default=1, help="simulated CPU devices; 1 takes the default device")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the files")
    parser.add_argument("--json", action="store_true", help="print the measurements as JSON")
    parser.add_argument("--measure", type=pathlib.Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder) / "model"
        build(directory, options.megabytes, options.dtype)
        result = _child(options, directory)
    if options.json:
        print(json.dumps(result, indent=2))
        return
    parameters, files, bound = (result[f"{name}_bytes"] / 1e6 for name in ("parameter", "file", "bound"))
    print(f"{result['devices']} device(s), {result['device']}: {parameters:.0f} MB of float32 parameters, ", end="")
    print(f"{files:.0f} MB of {options.dtype} files; one shard and one layer: {bound:.1f} MB\n")
    print("| | seconds | MB/s of files | peak host memory / parameters | beside the parameters, MB |")
    print("|---|---|---|---|---|")
    for name in ("load", "save"):
        row = result[name]
        memory = f"{row['peak_to_parameters']:.3f} | {row['beside_parameters_bytes'] / 1e6:.1f}"
        print(f"| {name}_hf | {row['seconds']:.2f} | {row['MB/s']:.0f} | {memory} |")
    row = result["plain_read"]
    print(f"| safetensors.numpy.load_file | {row['seconds']:.2f} | {row['MB/s']:.0f} | | |")
    print(f"\nThe first load, which compiles, took {result['first_load_seconds']:.2f} s.")


if __name__ == "__main__":
    main()
