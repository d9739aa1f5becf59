"""The command line: `python -m selfplay_jax.main --config=configs/tpaw.py[:preset] [--workdir=DIR] [--config.x=y ...]`.

On several hosts run it on each: Cloud TPU, GKE, Slurm and Open MPI tell the processes of each other; elsewhere add
`--coordinator=HOST:PORT --num_processes=N --process_id=I`.

Exit codes: 0 done, 1 a user's error (one sentence on stderr), 70 an unexpected error (a traceback), 75 stopped by a
signal; 76 another process of the job died or never came. After 75 and 76 the same command goes on.
"""

import contextlib
import logging as standard_logging
import os
import pathlib
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import config_flags

from selfplay_jax.config import flat, unknown_field
from selfplay_jax.errors import Stopped, UserError
from selfplay_jax.stores import is_remote

UNEXPECTED = 70  # EX_SOFTWARE: not 1, which launchers take for the user's to mend, and do not try again
RESUMABLE = 75  # EX_TEMPFAIL: what launchers take for "run it again"
_AT_ONCE_S = 5.0
_GO_ON = "stopped; run the same command to go on"


def read_flags(argv: Sequence[str]) -> tuple[Any, str]:
    """Parses the command line into (config, workdir).

    Raises:
      UserError: no config, no such file or preset, an unknown field (near matches are named), a value of another type.
    """
    chosen = [arg for arg in argv if re.match(r"--?config=.", arg)]
    if len(chosen) != 1:
        raise UserError(
            "say which experiment to run, once and with an equals sign: --config=configs/tpaw.py[:preset] (or sft.py, "
            "dpo.py, spin.py, tspin.py), then --workdir=DIR and --config.FIELD=VALUE as you like."
        )
    _check_file(pathlib.Path(chosen[0].split("=", 1)[1].split(":", 1)[0]))
    defaults = _parse(chosen).config
    for arg in argv:
        override = re.match(r"--?(?:no)?config\.([^=]+)", arg)
        if override and override.group(1) not in flat(defaults):
            raise unknown_field(override.group(1), defaults)
    values = _parse(argv)
    config = values.config
    return config, values.workdir or config.workdir or f"runs/{config.method}-{config.preset}"


def read_job_flags(argv: Sequence[str]) -> dict[str, Any]:
    """The arguments of `distributed.initialise` on a command line that `read_flags` accepted."""
    values = _parse(argv)
    return {"mode": values.distributed} | {
        name: getattr(values, name) for name in ("coordinator", "num_processes", "process_id")
    }


def _check_file(file: pathlib.Path) -> None:
    if _defines_a_config(file):
        return
    folder = file.parent if file.parent.is_dir() else pathlib.Path("configs")
    there = ", ".join(sorted(str(path) for path in folder.glob("*.py") if _defines_a_config(path)))
    problem = f"{file} defines no get_config" if file.is_file() else f"there is no config file {file}"
    raise UserError(f"{problem}; in {folder}/ there are: {there or 'none'}.")


def _defines_a_config(file: pathlib.Path) -> bool:
    return file.is_file() and file.suffix == ".py" and b"def get_config(" in file.read_bytes()


def _parse(argv: Sequence[str]) -> flags.FlagValues:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "configs/METHOD.py[:preset]", flag_values=values)
    flags.DEFINE_string("workdir", "", "where the run lives; default runs/METHOD-PRESET", flag_values=values)
    flags.DEFINE_string("distributed", "auto", "auto, on, off: join the other processes of the job", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where nothing tells it", flag_values=values)
    flags.DEFINE_integer("num_processes", 0, "how many processes play together", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "which of them this is, from 0", flag_values=values)
    before, sys.argv = sys.argv, ["main", *argv]  # ml_collections looks for overrides there and nowhere else
    try:
        rest = values(sys.argv)
    except flags.Error as error:
        raise UserError(
            f"{error}; flags are --config, --workdir, --config.FIELD=VALUE, and --coordinator, "
            "--num_processes, --process_id, --distributed for jobs of several processes."
        ) from error
    except TypeError as error:
        raise UserError(f"a config override has the wrong type: {error}.") from error
    finally:
        sys.argv = before
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: overrides are written --config.FIELD=VALUE.")
    return values


class Signals:
    """Turns the first Ctrl-C, SIGTERM or SIGHUP into a wish to stop at a safe point; a second Ctrl-C ends at once.

    A host that shuts down sends SIGHUP right after SIGTERM to what was started over ssh; under nohup it stays ignored.

    Python runs a handler when the main thread is back from C++, which for a process that waits for its peers may be
    never. So Python's C handler also writes the number into a socket (`set_wakeup_fd`), and a thread reads it there.
    """

    def __init__(self) -> None:
        self.asked = False
        self._announced = threading.Lock()
        self._handled = False
        heard, wakeup = socket.socketpair()
        wakeup.setblocking(False)
        self._kept = wakeup  # closed when it is collected
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._handle)
        signal.set_wakeup_fd(wakeup.fileno(), warn_on_full_buffer=False)
        # What a forked child is sent is not for this process.
        os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))
        threading.Thread(target=self._listen, args=[heard], daemon=True, name="signals").start()

    def _handle(self, number: int, frame: Any) -> None:
        if self._handled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._handled = True
        self._ask()

    def _ask(self) -> None:
        self.asked = True
        if self._announced.acquire(blocking=False):  # the handler and the thread both come here
            with contextlib.suppress(OSError):  # a terminal that was closed
                os.write(2, b"\nstopping at the next safe point; the same command will go on from there\n")

    def _listen(self, heard: socket.socket) -> None:
        first = True
        while True:
            number = heard.recv(1)[0]
            if signal.getsignal(number) != self._handle:  # another's, or no longer ours
                continue
            self._ask()
            if number == signal.SIGINT and not first:
                time.sleep(_AT_ONCE_S)  # the main thread's time to end with its KeyboardInterrupt
                _interrupt()
            first = False


def _interrupt() -> NoReturn:
    """Ends the process, and its job, from any thread."""
    from selfplay_jax import distributed, watch

    with contextlib.suppress(OSError):
        os.write(2, f"{_GO_ON}\n".encode())
    distributed.leave(RESUMABLE, "interrupted")
    watch.end("", RESUMABLE)


def _use_compilation_cache(folder: str) -> None:
    """Keeps compiled programs between runs: a resumed or repeated run starts in seconds."""
    import jax

    if folder and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        here = folder if is_remote(folder) else str(pathlib.Path(folder).expanduser())
        jax.config.update("jax_compilation_cache_dir", here)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    logging.set_verbosity(logging.ERROR)  # Orbax tells of every file it writes
    # ...and its writers that a full disk stopped each print a traceback at exit, after the sentence that says it all.
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    # Without a network the Hub's client warns of every attempt; the sentence at the end says it once.
    standard_logging.getLogger("huggingface_hub.utils._http").setLevel(standard_logging.ERROR)
    argv = sys.argv[1:] if argv is None else argv
    try:
        config, workdir = read_flags(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    signals = Signals()
    from selfplay_jax import distributed  # brings in jax: not for a misspelt flag

    try:
        _use_compilation_cache(config.compilation_cache)
        distributed.initialise(**read_job_flags(argv), asked=lambda: signals.asked)
        from selfplay_jax.selfplay import play

        play(config, workdir, lambda: signals.asked)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return distributed.leave(1, str(error))
    except Stopped:
        print(_GO_ON, file=sys.stderr)
        return distributed.leave(RESUMABLE)
    except KeyboardInterrupt:  # the second Ctrl-C
        print(_GO_ON, file=sys.stderr)
        return distributed.leave(RESUMABLE, "interrupted")
    except Exception as error:
        distributed.failed(error, UNEXPECTED)
        traceback.print_exc()
        return UNEXPECTED
    return distributed.leave(0)


if __name__ == "__main__":
    sys.exit(main())
