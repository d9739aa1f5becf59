"""Runs the launchers against stand-ins for gcloud, kubectl and sky (tests/stubs)."""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
STUBS = pathlib.Path(__file__).parent / "stubs"
HOSTILE = "a b; rm -rf ~ $(id) 'x' \"y\" `id` \\ * {é}"


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def script(path: pathlib.Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def stand_in(path: pathlib.Path, program: str, *args: str) -> None:
    """Puts tests/stubs/PROGRAM where PATH finds it as another one."""
    words = [sys.executable, "-I", "-S", str(STUBS / program), *args]
    script(path, f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')


def recording_stubs(folder: pathlib.Path, *names: str) -> dict[str, str]:
    """Stand-ins that only record; returns the environment in which they are found, with a token in it."""
    for name in names:
        stand_in(folder / "bin" / name, "recorder.py", name)
    return {"PATH": f"{folder / 'bin'}:/usr/local/bin:/usr/bin:/bin", "STUB_DIR": str(folder), "HF_TOKEN": "sentinel"}


def recorded(stubs: dict[str, str]) -> list[dict[str, Any]]:
    path = pathlib.Path(stubs["STUB_DIR"]) / "calls.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class FakeCloud:
    """A checkout with launch/ in it, a simulated Cloud TPU service, and what was asked of it."""

    def __init__(
        self, tmp_path: pathlib.Path, lives: Sequence[dict[str, Any]] = ({},), codes: str = "0", workers: int = 2
    ):
        self.dir = tmp_path
        self.repo = tmp_path / "checkout"
        shutil.copytree(ROOT / "launch", self.repo / "launch")
        for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "as it is"]):
            subprocess.run(["git", "-c", "user.name=t", "-c", "user.email=t@t", *command], cwd=self.repo, check=True)
        stand_in(tmp_path / "bin/gcloud", "gcloud.py")
        script(tmp_path / "vm_bin/hostname", '#!/bin/sh\necho "t1v-n-0-w-$STUB_WORKER"\n')
        python = shlex.quote(str(STUBS / "vm_python.sh"))
        script(
            tmp_path / "vm_bin/make",
            f'#!/bin/sh\nmkdir -p "$2/.venv/bin" && cp {python} "$2/.venv/bin/python" && echo "$@"\n',
        )
        (tmp_path / "script.json").write_text(json.dumps({"workers": workers, "lives": list(lives)}))
        (tmp_path / "codes").write_text(codes + "\n")

    def command(self, launcher: str, *args: str, name: str = "demo") -> list[str]:
        words = [str(self.repo / "launch" / launcher)]
        if launcher == "tpu_vm.sh":
            words, args = [*words, args[0]], args[1:]
        options = [f"--name={name}", "--zone=us-west4-a", "--project=my-project", "--bucket=gs://bucket", "--poll=0.05"]
        if launcher == "babysit.sh":
            options += ["--backoff=0.01", "--max-backoff=1", "--settle=0.01"]
        return [*words, *options, *args]

    def environment(self, **env: str) -> dict[str, str]:
        path = f"{self.dir / 'bin'}:{os.environ['PATH']}"
        return {"HOME": str(self.dir), "PATH": path, "STUB_DIR": str(self.dir), "TMPDIR": str(self.dir), **env}

    def run(self, launcher: str, *args: str, name: str = "demo", **env: str) -> subprocess.CompletedProcess[str]:
        command = self.command(launcher, *args, name=name)
        return subprocess.run(command, env=self.environment(**env), capture_output=True, text=True, timeout=120)

    @property
    def calls(self) -> list[list[str]]:
        path = self.dir / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def find(self, *words: str) -> list[list[str]]:
        """The calls that have all these words, as arguments or inside one."""
        return [call for call in self.calls if all(any(word in arg for arg in call) for word in words)]

    def await_program(self, workers: int = 2, start: int = 1) -> None:
        """Until the program waits for signals on all workers."""
        wait_for(lambda: all((self.dir / f"ready.{worker}.{start}").exists() for worker in range(workers)))

    def argv(self, worker: int = 0, start: int = 1) -> list[str]:
        """What the program was started with."""
        return (self.dir / f"argv.{worker}.{start}").read_text().split("\0")[:-1]

    def env(self, worker: int = 0, start: int = 1) -> dict[str, str]:
        entries = (self.dir / f"env.{worker}.{start}").read_text().split("\0")[:-1]
        return dict(entry.split("=", 1) for entry in entries)

    def everything_written(self) -> str:
        """The text of every file that a launcher, a VM or the bucket holds, without the secrets' own store."""
        files = [path for path in self.dir.rglob("*") if path.is_file() and not path.name.startswith("env.")]
        files = [path for path in files if not path.is_relative_to(self.dir / "secrets")]
        return "\n".join(path.read_text(errors="replace") for path in files)

    def close(self) -> None:
        for pid in self.dir.glob("vms/*/.selfplay_jax/*/pid"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.killpg(int(pid.read_text()), signal.SIGKILL)
