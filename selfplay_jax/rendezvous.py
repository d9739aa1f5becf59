"""How the processes of a job meet, before jax's runtime connects them.

Process 0 listens on the coordinator's port until all have said hello there, and then leaves the port to the runtime.
The runtime's own waiting hears no signal, does not say who is missing, and crashes on a port that is taken.
"""

import contextlib
import json
import select
import socket
import sys
import time
from collections.abc import Callable
from typing import Any

from selfplay_jax.errors import Stopped, UserError
from selfplay_jax.watch import PEER_DIED, called, end

_TURN_S = 0.2  # how often a waiting process looks whether it was asked to stop
_SAY_IT_S = 10.0  # after which it says for whom it waits
_LONGEST = 4096  # bytes of a word: more is no process of ours


def meet(coordinator: str, index: int, count: int, asked: Callable[[], bool], patience: float) -> None:
    """Returns when all processes of the job are here; after `patience` seconds ends this one (76), naming who is not.

    Args:
      coordinator: HOST:PORT of process 0, as the others reach it.
      index, count: which process this is, of how many.
      asked: whether this process was asked to stop.
    Raises:
      UserError: process 0 cannot listen on the port; a process counts the others differently; a number given twice.
      Stopped: this process, or one that had said hello, was asked to stop.
    """
    host, port = coordinator.rsplit(":", 1)
    if index == 0:
        with contextlib.closing(_listen(int(port))) as door:
            here = _receive(door, count, asked, patience)
        for guest in here.values():  # now that the port is free
            guest.say(go=True)
            guest.close()
    else:
        _visit(host.strip("[]"), int(port), index, count, asked, patience)


class _Guest:
    """A connection on which words, JSON objects, travel line by line."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(_TURN_S)
        self._connection, self._heard = connection, b""
        self.fileno, self.close = connection.fileno, connection.close

    def say(self, **word: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone
            self._connection.sendall(json.dumps(word).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """The next word, or {} as long as there is none; OSError where there will be none."""
        if b"\n" not in self._heard:
            try:
                received = self._connection.recv(_LONGEST)
            except TimeoutError:
                return {}
            self._heard += received
            if not received or len(self._heard) > _LONGEST:
                raise ConnectionError("no process of this job answers")
        line, newline, rest = self._heard.partition(b"\n")
        if not newline:
            return {}
        self._heard = rest
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ConnectionError("no process of this job answers") from error


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        return socket.create_server(("", port), family=family, backlog=1024, dualstack_ipv6=both)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror}): end what holds it (another run?), or give "
            "all processes another one with --coordinator=HOST:PORT (JAX_COORDINATOR_PORT where they are detected)."
        ) from error


def _receive(door: socket.socket, count: int, asked: Callable[[], bool], patience: float) -> dict[int, _Guest]:
    """All other processes, by number."""
    began, said = time.monotonic(), False
    here: dict[int, _Guest] = {}
    strangers: list[_Guest] = []  # who have not said hello yet
    try:
        while len(here) < count - 1:
            waited = time.monotonic() - began
            missing = called([process for process in range(1, count) if process not in here])
            if asked():
                raise Stopped
            if waited > patience:
                sentence = _never(missing, count, patience)
                for guest in here.values():
                    guest.say(never=sentence)
                end(sentence, PEER_DIED)
            if waited > _SAY_IT_S and not said:
                print(f"waiting for {missing} of {count}", file=sys.stderr)
                said = True
            awaited: list[Any] = [door, *strangers, *here.values()]
            for ready in select.select(awaited, [], [], _TURN_S)[0]:
                if ready is door:
                    strangers.append(_Guest(door.accept()[0]))
                elif ready in strangers or ready in here.values():  # not one that was just replaced
                    _listen_to(ready, strangers, here, count)
    except (Stopped, UserError) as reason:
        for guest in here.values():
            guest.say(stop=True) if isinstance(reason, Stopped) else guest.say(error=str(reason))
        raise
    return here


def _listen_to(guest: _Guest, strangers: list[_Guest], here: dict[int, _Guest], count: int) -> None:
    try:
        word = guest.hear()
    except OSError:
        word = {"gone": True}
    if not word:
        return
    if "stop" in word and guest in here.values():
        raise Stopped
    process: Any = word.get("process")
    if guest in strangers:
        strangers.remove(guest)
    for number in [number for number, other in here.items() if other is guest]:
        del here[number]
    if not isinstance(process, int) or "count" not in word:
        guest.close()
        return
    if word["count"] != count:
        raise _tell(guest, f"process {process} was told of {word['count']} processes, process 0 of {count}: "
                    "give all the same --num_processes.")  # fmt: skip
    if process not in range(1, count):
        raise _tell(
            guest, f"--process_id={process} was given twice or is too large: the {count} processes count from 0."
        )
    if process in here:  # the same host anew, or a mistake: the older one is the one to go
        _tell(here[process], f"another process came as --process_id={process}: give each its own number.")
    here[process] = guest
    guest.say(welcome=True)


def _tell(guest: _Guest, sentence: str) -> UserError:
    guest.say(error=sentence)
    guest.close()
    return UserError(sentence)


def _visit(host: str, port: int, index: int, count: int, asked: Callable[[], bool], patience: float) -> None:
    """Says hello to process 0, and waits for its word."""
    began, said, problem = time.monotonic(), False, ""
    while time.monotonic() - began < patience:
        if asked():
            raise Stopped
        if time.monotonic() - began > _SAY_IT_S and not said:
            print(f"waiting for process 0 of {count} at {host}:{port}", file=sys.stderr)
            said = True
        try:
            with contextlib.closing(_Guest(socket.create_connection((host, port), timeout=2.0))) as lead:
                lead.say(process=index, count=count)
                _obey(lead, asked, patience)
            return _await_runtime(host, port)
        except OSError as error:
            problem = f", {host}:{port}: {error.strerror or error}"
        time.sleep(_TURN_S)
    end(_never("process 0", count, patience, problem), PEER_DIED)


def _await_runtime(host: str, port: int) -> None:
    """Returns when process 0's runtime listens, after a second at the latest: ours would only try once a second."""
    for _ in range(20):
        with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1.0):
            return
        time.sleep(0.05)


def _obey(lead: _Guest, asked: Callable[[], bool], patience: float) -> None:
    """Returns when process 0 says go; OSError where it does not speak, or no more."""
    word: dict[str, Any] = {}
    until = time.monotonic() + 2.0  # for the welcome; then process 0's patience counts, which may have begun just now
    while time.monotonic() < until and "go" not in word:
        if asked():
            lead.say(stop=True)
            raise Stopped
        word = lead.hear()
        if "welcome" in word:
            until = time.monotonic() + patience + 10.0
        if "stop" in word:
            raise Stopped
        if "error" in word:
            raise UserError(word["error"])
        if "never" in word:
            end(word["never"], PEER_DIED)
    if "go" not in word:
        raise TimeoutError("no process of this job answers")


def _never(missing: str, count: int, patience: float, problem: str = "") -> str:
    return (
        f"{missing} of {count} never came (waited {patience:.0f} s{problem}): look whether the host came up and was "
        "given the same --coordinator and --num_processes; run the same command on all to go on"
    )
