"""The watch that every process of a job keeps over the others, so that the death of one ends all, with a sentence.

Each process beats in the coordination service's key-value store. The lead looks at everybody's beats, the others at
whether the store, which lives in the lead, still answers. jax's own heartbeats would find out too, later, and abort
with a C++ stack that names nobody.
"""

import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

PEER_DIED = 76  # the exit code for "start the job again": not 0, 1 or 75

_BEAT_S = 1.0
_DEAD_S = 20.0  # without a beat; a process is silent for some seconds where a library holds Python's lock
_GOODBYE_S = 3.0  # the lead waits so long before it takes the store with it
_ALIVE, _SAID, _STOP = "selfplay/alive", "selfplay/said", "selfplay/stop"
# What the runtime's errors say when a peer is gone: gloo's, and the coordination service's.
_LOST = "Gloo|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|[Cc]oordination|[Pp]eer|[Ss]ocket"
_AGAIN = "the job ends; run the same command on all to go on"


class Watch:
    """Beats, listens and judges in threads of its own, until `stop`."""

    def __init__(self, store: Any, index: int, count: int, coordinator: str):
        self._store, self._index, self._count, self._coordinator = store, index, count, coordinator
        self._asked: Callable[[], bool] = lambda: False
        self.stop_wished = False  # some process was asked to stop
        self._answered = time.monotonic()  # when the store last did
        self._beats: dict[int, tuple[str, float]] = {}  # by process its last beat, and when that came
        self._ending = threading.Lock()
        self._over = threading.Event()

    def start(self) -> None:
        """Begins to watch."""
        on_abort(self._explain_abort)
        for work in (self._beat, self._judge):
            threading.Thread(target=work, daemon=True, name=f"watch{work.__name__}").start()

    def stop(self) -> None:
        """Ends the watch: from now on processes come and go."""
        self._over.set()

    def wish(self, asked: Callable[[], bool]) -> None:
        """`asked` says whether this process was asked to stop; the others hear of it."""
        self._asked = asked

    def tell_wish(self) -> None:
        """Tells the others that this process was asked to stop."""
        self._store.key_value_set(f"{_STOP}/{self._index}", "", allow_overwrite=True)

    def is_stop_wished(self) -> bool:
        """Asks the store whether some process was asked to stop; `stop_wished` is what it said at the last beat."""
        return bool(self._store.key_value_dir_get(_STOP))

    def farewell(self, sentence: str, code: int) -> None:
        """Tells the others why this process ends, and ends it."""
        self._say({"sentence": f"process {self._index} of {self._count} ended: {sentence}", "code": code})
        self._end("", code)

    def failed(self, error: BaseException, code: int) -> None:
        """Ends the process: by the verdict on a peer where an error looks like its death, else with `code`."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if re.search(_LOST, text):
            time.sleep(_DEAD_S + 10 * _BEAT_S)  # `_end` comes from a thread
        self._say({"sentence": f"process {self._index} of {self._count} failed ({text}); {_AGAIN}", "code": PEER_DIED})
        traceback.print_exception(error)
        self._end("", code)

    # What the threads do

    def _beat(self) -> None:
        number = 0
        while not self._over.wait(_BEAT_S):
            number += 1
            try:
                self._store.key_value_set(f"{_ALIVE}/{self._index}", str(number), allow_overwrite=True)
                if self._asked() and not self.stop_wished:
                    self.tell_wish()
                self._listen()
                if self._index == 0:
                    self._count_beats()
            except Exception:  # jax raises several kinds; `_judge` decides when the silence is too long
                continue
            self._answered = time.monotonic()

    def _listen(self) -> None:
        said = [(key, json.loads(text)) for key, text in self._store.key_value_dir_get(_SAID)]
        others = [what for key, what in said if not key.endswith(f"/{self._index}")]
        if others and not self._over.is_set():
            self._end(others[0]["sentence"], others[0]["code"])
        self.stop_wished = self.is_stop_wished()

    def _count_beats(self) -> None:
        now = time.monotonic()
        for key, beat in self._store.key_value_dir_get(_ALIVE):
            process = int(key.rsplit("/", 1)[1])
            if self._beats.get(process, ("", 0.0))[0] != beat:
                self._beats[process] = beat, now

    def _judge(self) -> None:
        began = looked = time.monotonic()
        while not self._over.wait(_BEAT_S):
            now = time.monotonic()
            if now - looked > 5 * _BEAT_S:  # this process itself was suspended: nobody could be heard
                began = self._answered = now
                self._beats = {process: (beat, now) for process, (beat, _) in self._beats.items()}
            looked = now
            if self._index == 0:
                last = {process: self._beats.get(process, ("", began))[1] for process in range(1, self._count)}
                dead = [process for process, heard in last.items() if now - max(heard, began) > _DEAD_S]
                if dead:
                    self._verdict(dead)
            elif now - self._answered > _DEAD_S:
                self._verdict([0])

    def _verdict(self, dead: list[int]) -> None:
        sentence = f"{called(dead)} of {self._count} died (no heartbeat for {_DEAD_S:.0f} s); {_AGAIN}"
        if self._index == 0:
            self._say({"sentence": sentence, "code": PEER_DIED})
        self._end(sentence, PEER_DIED)

    def _say(self, what: dict[str, Any]) -> None:
        try:
            self._store.key_value_set(f"{_SAID}/{self._index}", json.dumps(what), allow_overwrite=True)
        except Exception:  # the store went with the lead
            return

    def _end(self, sentence: str, code: int) -> None:
        if not self._ending.acquire(blocking=False):
            time.sleep(3600)  # another thread is at it
        if self._index == 0:
            time.sleep(_GOODBYE_S)
        end(sentence, code)

    def _explain_abort(self) -> str:
        """The runtime aborts as soon as the lead's service is gone: then that is the reason."""
        if self._index == 0 or self._over.is_set() or self._lead_listens():
            return ""
        return f"process 0 of {self._count} died (its service is gone); {_AGAIN}"

    def _lead_listens(self) -> bool:
        host, port = self._coordinator.rsplit(":", 1)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
                return True
        except OSError:
            return False


def called(numbers: list[int]) -> str:
    """Processes as a sentence names them."""
    return f"process {numbers[0]}" if len(numbers) == 1 else "processes " + ", ".join(map(str, numbers))


def on_abort(explain: Callable[[], str]) -> None:
    """When the C++ runtime aborts, ends with `explain`'s sentence and exit code 76; "" lets it abort.

    The runtime leaves no other way to hear of the end of a job: its callback for that cannot be written in Python.
    """
    libc = ctypes.CDLL(None)

    def aborted(number: int) -> None:
        libc.signal(number, 0)  # the next one is real
        sentence = explain()
        if sentence:
            end(sentence, PEER_DIED)

    _kept[:] = [ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)]
    libc.signal(int(signal.SIGABRT), _kept[0])


_kept: list[Any] = []  # what C calls must not be collected


def end(sentence: str, code: int) -> NoReturn:
    """Ends the process from any thread, whatever the others wait for."""
    try:
        if sentence:
            cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar may have hidden it
            os.write(2, f"{cursor}{sentence}\n".encode())
        sys.stdout.flush()
    finally:  # a closed terminal must not keep it
        os._exit(code)
