"""What holds for all launchers."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest
from fake_cloud import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.rglob("*.sh"))
LAUNCHERS = [path for path in SCRIPTS if path.name in ("tpu_vm.sh", "babysit.sh", "local.sh", "sky.sh", "jobset.sh")]


def test_shellcheck() -> None:
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (it comes with the extra `test`)")
    done = subprocess.run([shellcheck, "-x", *map(str, SCRIPTS)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.name)
def test_help_names_every_option_and_command(path: pathlib.Path) -> None:
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 0 and "usage: launch/" in done.stdout and "--dry-run" in done.stdout
    text = path.read_text()
    options = set(re.findall(r"^    (--[a-z-]+)(?:=\*)?\)", text, re.MULTILINE)) - {"--"}
    assert options and {option for option in options if option not in done.stdout and option != "--help"} == set()
    assert "set -euo pipefail" in text or "set -Eeuo pipefail" in text


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_of_macos(path: pathlib.Path) -> None:
    """bash 3.2 has none of these; worker.sh runs on Linux."""
    newer = (
        r"declare -A|local -A|\$\{\w+(,,|\^\^)|wait -n|mapfile|readarray|&>>|\|&|\$\{\w+@[QEPA]\}|\bcoproc\b|local -n"
    )
    if path.name != "worker.sh":
        assert not re.search(newer, re.sub(r"^\s*#.*", "", path.read_text(), flags=re.MULTILINE))
    assert path.stat().st_mode & 0o100 or "sourced" in path.read_text() or "sources this" in path.read_text()


def test_every_launcher_refuses_an_empty_command_line_kindly() -> None:
    for path in LAUNCHERS:
        done = subprocess.run([path], capture_output=True, text=True, timeout=60, env={"PATH": "/usr/bin:/bin"})
        if done.returncode == 0:
            assert "usage: launch/" in done.stdout, path.name
        else:
            assert done.returncode == 64 and "error: " in done.stderr.splitlines()[-1], path.name
