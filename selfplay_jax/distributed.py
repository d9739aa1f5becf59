"""Many processes that play one game: who they are, what they agree on, and how all of them end when one does.

With one process everything here does nothing. With several, all run the same program on one global mesh; process 0,
the lead, writes the shared files, talks on the terminal and decides whatever is decided from files (`agree`). The
processes talk through the key-value store of jax.distributed's coordination service, which lives in process 0.
"""

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from selfplay_jax import rendezvous
from selfplay_jax.environment import processes
from selfplay_jax.errors import Stopped, UserError
from selfplay_jax.watch import Watch, on_abort

T = TypeVar("T")

_WAIT_FOR_PEERS_S = 180  # at the start: hosts of a slice come up within minutes of each other
_CONNECT_S = 60  # once they have met
_RUNTIME_HEARTBEAT_S = 60  # jax's own, which aborts with a C++ stack; `Watch` is quicker and says who died
_SHUTDOWN_S = 30
_FOREVER_MS = 7 * 24 * 3600 * 1000  # waiting for a slow process; a dead one is the watch's business
_GIVE_FLAGS = "check --coordinator=HOST:PORT --num_processes=N --process_id=I"


class _Job:
    """What this process knows of the job; `count` 1 and no store until `initialise`."""

    def __init__(self) -> None:
        self.index, self.count = 0, 1
        self.store: Any = None
        self.watch: Watch | None = None
        self.said = 0  # how many things were agreed on, gathered or waited for: names the next one
        self.alone = False  # inside `each`: the others may be anywhere
        self.deciding = False  # inside `agree`, on the lead


_job = _Job()


def index() -> int:
    """This process's number, 0 for the lead."""
    return _job.index


def count() -> int:
    """How many processes play together."""
    return _job.count


def is_lead() -> bool:
    """Whether this process writes the shared files and talks."""
    return _job.index == 0


# Beginning and end


def initialise(
    mode: str = "auto",
    coordinator: str = "",
    num_processes: int = 0,
    process_id: int = -1,
    asked: Callable[[], bool] = lambda: False,
) -> None:
    """Joins the other processes of the job; must come before jax touches a device.

    Ends the process with exit code 76, and a sentence that names them, where others do not come in time.

    Args:
      mode: "auto" joins where the three flags are given or where a Cloud TPU slice, GKE, Slurm or Open MPI environment
        has several processes; "on" joins in any case; "off" plays alone.
      coordinator, num_processes, process_id: where process 0 listens (HOST:PORT), how many there are, and which this
        is; "", 0 and -1 leave it to the environment.
      asked: says whether this process was asked to stop.
    Raises:
      UserError: flags that contradict each other or the environment, or a port that is taken.
      Stopped: a process was asked to stop while it waited.
    """
    given = [bool(coordinator), num_processes > 0, process_id >= 0]
    if mode not in ("auto", "on", "off"):
        raise UserError(f"--distributed={mode} is not one of auto, on, off.")
    if mode == "off" or (not any(given) and mode == "auto" and processes() < 2):
        return
    if any(given) and not all(given):
        raise UserError("--coordinator=HOST:PORT, --num_processes=N and --process_id=I go together: give all three.")
    if all(given):
        _check_flags(coordinator, num_processes, process_id)
    else:
        coordinator, num_processes, process_id = _detect()
    if num_processes > 1:
        _connect(coordinator, num_processes, process_id, asked)


def _check_flags(coordinator: str, num_processes: int, process_id: int) -> None:
    host, colon, port = coordinator.rpartition(":")
    if not (host and colon and port.isdecimal() and 0 < int(port) < 65536):
        raise UserError(f"--coordinator={coordinator} must read HOST:PORT, the address of process 0's machine.")
    if process_id >= num_processes:
        raise UserError(f"--process_id={process_id} must be below --num_processes={num_processes}: they count from 0.")


def _detect() -> tuple[str, int, int]:
    """What the environment tells of the coordinator, the number of processes, and this one's."""
    from jax._src.clusters import ClusterEnv  # as jax.distributed.initialize does it; there is no public name

    told = os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        address, number, own, _ = ClusterEnv.auto_detect_unset_distributed_params(
            told, None, None, None, None, _WAIT_FOR_PEERS_S
        )
    except (RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"the environment's processes cannot be found ({said}): {_GIVE_FLAGS}.") from error
    if address is None or number is None or own is None:
        raise UserError(f"the environment does not tell of other processes: {_GIVE_FLAGS}.")
    return address, number, own


def _connect(coordinator: str, count: int, index: int, asked: Callable[[], bool]) -> None:
    # CPU devices of several processes reach each other through gloo; other platforms ignore the setting.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # jax's preemption service would take SIGTERM for itself; `Stop` does what it does, for Ctrl-C too.
    jax.config.update("jax_enable_preemption_service", False)
    rendezvous.meet(coordinator, index, count, asked, _WAIT_FOR_PEERS_S)
    lost = f"the processes met but did not connect within {_CONNECT_S} s; run the same command on all of them"
    on_abort(lambda: lost)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            initialization_timeout=_CONNECT_S,
            heartbeat_timeout_seconds=_RUNTIME_HEARTBEAT_S,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    except (RuntimeError, ValueError, OSError) as error:
        said = " ".join(str(error).split())[:300]
        raise UserError(f"the processes of the job cannot connect ({said}): {_GIVE_FLAGS}.") from error
    from jax._src import distributed  # the store has no public name yet; Orbax takes it from here too

    _job.index, _job.count, _job.store = index, count, distributed.global_state.client
    _job.watch = Watch(_job.store, index, count, coordinator)
    _job.watch.wish(asked)
    _job.watch.start()
    if jax.default_backend() == "cpu":
        # Only the lead would find its programs there, and gloo gives up on others that compile for over 30 s.
        jax.config.update("jax_enable_compilation_cache", False)


def leave(code: int, sentence: str = "") -> int:
    """The last call of a process: returns `code` once all processes are here.

    With a `sentence` it ends at once and they with it, wherever they wait: they say it, and end with the same code.
    """
    if _job.watch is None:
        return code
    if sentence:
        _job.watch.farewell(sentence, code)
    barrier("end")
    _job.watch.stop()
    jax.distributed.shutdown()
    return code


def failed(error: BaseException, code: int) -> None:
    """What to do with an exception that is no user's error. With several processes it ends this one: with a sentence
    where a peer's death explains the error, else with the traceback and `code`, and the others hear of it.
    """
    if _job.watch is not None:
        _job.watch.failed(error, code)


# Agreement


def agree(make: Callable[[], T]) -> T:
    """What `make()` returns on the lead, on all processes; the others do not call it.

    The value passes through JSON where there are several processes: tuples come back as lists. A `UserError` or
    `Stopped` of the lead is raised by all. All processes must come here, in the same order of calls.
    """
    if _job.count == 1 or _job.deciding:
        return make()
    assert not _job.alone, "agree() inside each(): the other processes are not here"
    key = _next("agree")
    if is_lead():
        said: dict[str, Any]
        _job.deciding = True
        try:
            said = {"value": make()}
        except UserError as error:
            said = {"error": str(error)}
        except Stopped:
            said = {"stopped": True}
        finally:
            _job.deciding = False
        text = json.dumps(said)
        _job.store.key_value_set(key, text)
    else:
        text = _job.store.blocking_key_value_get(key, _FOREVER_MS)
    said = json.loads(text)
    if "error" in said:
        raise UserError(said["error"])
    if "stopped" in said:
        raise Stopped
    return said["value"]


def gather(value: Any) -> list[Any]:
    """Every process's `value` (anything JSON can say, small), by process."""
    if _job.count == 1:
        return [value]
    key = _next("gather")
    _job.store.key_value_set(f"{key}/{_job.index}", json.dumps(value))
    return [json.loads(_job.store.blocking_key_value_get(f"{key}/{i}", _FOREVER_MS)) for i in range(_job.count)]


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if _job.count > 1:
        _job.store.wait_at_barrier(f"{_next('barrier')}/{name}", _FOREVER_MS)


def each(work: Callable[[], T]) -> T:
    """Runs `work` on every process for itself, and waits for all. Where one was stopped, all raise `Stopped`.

    Inside, nothing may ask the others: `Stop.check` looks at what this process knows.
    """
    if _job.count == 1:
        return work()
    results: list[T] = []
    _job.alone = True
    try:
        results.append(work())
    except Stopped:
        pass
    finally:
        _job.alone = False
    if not all(gather(bool(results))):
        raise Stopped
    return results[0]


def mine(items: list[T]) -> list[T]:
    """This process's share of a list, dealt in turns."""
    return items[_job.index :: _job.count]


def _next(kind: str) -> str:
    _job.said += 1
    return f"selfplay/{kind}/{_job.said}"


class Stop:
    """The wish to stop (Ctrl-C, SIGTERM) of one process, which all processes follow at the same point."""

    def __init__(self, asked: Callable[[], bool] = lambda: False):
        """`asked` says whether this process was asked to stop."""
        self._asked = asked
        self._points = 0
        self._at: int | None = None
        self._told = False
        if _job.watch is not None:
            _job.watch.wish(asked)

    def known(self) -> bool:
        """Whether this process knows of a wish, its own or another's."""
        return self._asked() or (_job.watch is not None and _job.watch.stop_wished)

    def at_step(self) -> bool:
        """Whether to stop here; the same answer on all processes at the same call.

        Between two calls all processes must have waited for the lead, as they do for a training step's metrics. So the
        lead can name its next call as the one to stop at: nobody is past it. It costs everyone a look at the store.
        """
        if _job.count == 1:
            return self._asked()
        self._points += 1
        assert _job.watch is not None
        folder = "selfplay/stop_at"
        if self._asked() and not self._told:
            self._told = True
            _job.watch.tell_wish()  # now, not with the next beat
        if self._at is None and is_lead() and (self._told or _job.watch.is_stop_wished()):
            self._at = self._points + 1
            _job.store.key_value_set(f"{folder}/step", str(self._at))
        elif self._at is None and not is_lead():
            found = _job.store.key_value_dir_get(folder)
            self._at = int(found[0][1]) if found else None
        return self._at is not None and self._points >= self._at

    def check(self) -> None:
        """Raises `Stopped` when there is a wish: on all processes at once, inside `each` on those that know."""
        if self.known() if _job.alone else agree(self.known):
            raise Stopped


# Arrays


def to_devices(tree: Any, sharding: Sharding) -> Any:
    """Host arrays, the same on every process, as global arrays; of each only this process's part is transferred."""
    if _job.count == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(
        lambda leaf: jax.make_array_from_callback(np.shape(leaf), sharding, lambda where: np.asarray(leaf)[where]), tree
    )


def own_rows(sharding: Sharding, rows: int) -> np.ndarray | None:
    """Which of `rows` rows `to_devices` transfers here, bool [rows]; None for all of them."""
    if _job.count == 1:
        return None
    own = np.zeros(rows, bool)
    for where in sharding.addressable_devices_indices_map((rows,)).values():
        own[where] = True
    return own


def to_host(tree: Any) -> Any:
    """The values of (global) arrays on every process, NumPy; all processes must come here."""
    if any(not _readable(leaf) for leaf in jax.tree.leaves(tree)):
        tree = jax.jit(_same, out_shardings=jax.tree.map(_everywhere, tree))(tree)
    return jax.device_get(tree)


def _readable(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated


def _everywhere(leaf: jax.Array) -> NamedSharding:
    assert isinstance(leaf.sharding, NamedSharding)
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())


def _same(tree: Any) -> Any:
    return tree


def place(tree: Any, shardings: Any) -> Any:
    """Global arrays laid out anew, also where pieces must travel between processes."""
    return jax.device_put(tree, shardings) if _job.count == 1 else jax.jit(_same, out_shardings=shardings)(tree)


def local_mesh(mesh: Mesh) -> Mesh:
    """This process's devices as a mesh with the same axes, `tensor` (the last) as it was.

    The mesh itself where there is one process, or where the last axis lies across processes.
    """
    rows = mesh.devices.reshape(-1, mesh.devices.shape[-1])
    owners = [{device.process_index for device in row} for row in rows]
    if _job.count == 1 or any(len(owner) > 1 for owner in owners):
        return mesh
    local = np.stack([row for row, owner in zip(rows, owners, strict=True) if owner == {_job.index}])
    shape = (*[1] * (mesh.devices.ndim - 2), *local.shape)
    return Mesh(local.reshape(shape), mesh.axis_names, axis_types=mesh.axis_types)


def is_local(mesh: Mesh | None) -> bool:
    """Whether a mesh lies within this process though there are others."""
    return _job.count > 1 and mesh is not None and {d.process_index for d in mesh.devices.flat} == {_job.index}


def localise(tree: Any, mesh: Mesh) -> Any:
    """Global arrays that are cut over the last axis alone as arrays of the `local_mesh`; nothing is copied."""

    def local(leaf: jax.Array) -> jax.Array:
        assert isinstance(leaf.sharding, NamedSharding)
        pieces = {shard.device: shard.data for shard in leaf.addressable_shards}
        sharding = NamedSharding(mesh, leaf.sharding.spec)
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, [pieces[d] for d in mesh.devices.flat])

    return tree if not is_local(mesh) else jax.tree.map(local, tree)
