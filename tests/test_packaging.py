"""The lock, the Makefile and the wheel: what a newcomer's first command stands on."""

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
LOCK = (ROOT / "requirements.lock").read_text()

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked() -> list[tuple[Requirement, list[str]]]:
    """The lock's requirements, each with its hashes."""
    lines = [line for line in LOCK.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    entries = "\n".join(lines).replace("\\\n", " ").splitlines()
    split = [re.split(r"\s--hash=", entry.strip()) for entry in entries]
    return [(Requirement(head.strip()), [h.strip() for h in hashes]) for head, *hashes in split]


def active_pins(python: str) -> dict[str, str]:
    """Name to version as pip sees them on Linux under this Python."""
    environment = {
        **default_environment(),
        "python_version": ".".join(python.split(".")[:2]),
        "python_full_version": python,
        "sys_platform": "linux",
        "platform_system": "Linux",
    }
    active = [r for r, _ in locked() if r.marker is None or r.marker.evaluate(environment)]
    pins = {canonical(r.name): str(r.specifier) for r in active}
    assert len(pins) == len(active), "a package is pinned twice"
    return pins


def test_lock_names_no_host_and_no_option():
    assert "://" not in LOCK
    assert not [line for line in LOCK.splitlines() if line.startswith("-")]


def test_every_locked_requirement_is_pinned_and_hashed():
    for requirement, hashes in locked():
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert hashes, f"{requirement.name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), requirement.name


def test_default_install_has_no_other_framework_and_no_accelerator_package():
    heavy = re.compile(r"torch.*|nvidia-.*|triton|tensorflow(-cpu|-intel|-gpu)?|keras|libtpu.*|jax-cuda.*")
    assert not [r.name for r, _ in locked() if heavy.fullmatch(canonical(r.name))]


@pytest.mark.parametrize("python", ["3.11.7", "3.12.1"])
def test_lock_satisfies_pyproject(python):
    project = PYPROJECT["project"]
    wanted = (
        project["dependencies"]
        + project["optional-dependencies"]["test"]
        + project["optional-dependencies"]["cloud"]
        + PYPROJECT["build-system"]["requires"]  # the project itself is built without fetching anything more
    )
    pins = active_pins(python)
    for requirement in map(Requirement, wanted):
        version = pins[canonical(requirement.name)].removeprefix("==")
        assert requirement.specifier.contains(version, prereleases=True), f"{requirement}, locked {version}"


def make(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)


@needs_make
@pytest.mark.parametrize("target", ["setup", "demo", "test", "lint"])
def test_every_target_builds_the_environment_when_it_is_missing(tmp_path, target):
    done = make("-n", target, f"VENV={tmp_path / 'venv'}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.index("-m venv") < done.stdout.index("--require-hashes")
    if target == "demo":
        assert "-m selfplay_jax.main --config=configs/tpaw.py" in done.stdout


@needs_make
def test_python_too_old_is_one_clear_sentence(tmp_path):
    done = make("setup", f"VENV={tmp_path / 'venv'}", "PYTHON=/nonexistent/python3.8")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "/nonexistent/python3.8 is not that" in done.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_interrupted_installation_leaves_no_valid_environment(tmp_path):
    """A pip that fails half-way: no stamp, and the next run starts from nothing."""
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        f'  *"-m venv"*) mkdir -p {tmp_path}/venv/bin && cp "$0" {tmp_path}/venv/bin/python ;;\n'
        '  *"-m pip"*) exit 3 ;;\n'
        "esac\n"
    )
    python.chmod(0o755)
    for _ in range(2):
        done = make("setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
        assert done.returncode != 0
        assert f"Making {tmp_path / 'venv'}" in done.stdout
        assert not (tmp_path / "venv" / ".stamp").exists()


def test_wheel_holds_every_module_and_the_base_model(tmp_path):
    for name in ("pyproject.toml", PYPROJECT["project"]["readme"], "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    package = tmp_path / "selfplay_jax"
    shutil.copytree(ROOT / "selfplay_jax", package, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path / "dist", tmp_path], check=True, timeout=300)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    expected = {p.relative_to(tmp_path).as_posix() for p in package.rglob("*") if p.is_file()}
    assert {name for name in expected if name.endswith(".py") or "builtin_base" in name} <= packed
    assert "selfplay_jax/data/builtin_base/model.safetensors" in packed
