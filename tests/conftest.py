"""What every test runs under: eight simulated CPU devices, no network, no silent rank promotion."""

import importlib.metadata
import os
import pathlib
import platform
import sys

import pytest

if "jax" in sys.modules:
    raise RuntimeError("jax was imported before tests/conftest.py could choose its devices")

# Compiling is most of the suite's time, and the programs are tiny: cheap code, without jax 0.10's fusion emitters (a
# flag that later versions abort on).
_CHEAP = ["--xla_backend_optimization_level=0"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    _CHEAP.append("--xla_cpu_use_fusion_emitters=false")

# One thread per computation: `pytest -n 2` already keeps two cores busy.
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_cpu_multi_thread_eigen=false",
        *_CHEAP,
    )
).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ |= dict.fromkeys(("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"), "1")

import jax
from hypothesis import settings

jax.config.update("jax_numpy_rank_promotion", "raise")

# No deadline: an example's first call compiles. The same examples every time: a failure can be seen again.
settings.register_profile("selfplay_jax", deadline=None, derandomize=True)
settings.load_profile("selfplay_jax")


def pytest_configure(config: pytest.Config) -> None:
    """Compiled programs outlive the run, in one folder for all workers.

    The size limit is what makes JAX take a lock around reading and writing. The folder is named after the
    machine because compiled code may not run on another one. Processes that a test starts do not use it: some
    of them are killed.
    """
    cache = getattr(config, "cache", None)
    if cache is None:  # -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(cache.mkdir(f"jax-{platform.node()}")))
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# Their fixtures play whole games. Run first they stay with one worker: the others steal what stands at its end.
_FIRST = ("test_distributed_game", "test_resume", "test_variants", "test_notebooks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the modules with the most expensive fixtures first."""
    items.sort(key=lambda item: item.path.stem not in _FIRST)


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """The folder of third-party data and models beside the checkout; skips the test where there is none."""
    path = pathlib.Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("third-party data are not there: no folder `shared` beside the checkout")
    return path
