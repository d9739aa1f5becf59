"""A process of a small job, no game: `distributed_worker.py TASK PORT COUNT INDEX FOLDER`; see test_distributed.py."""

import json
import os
import sys
import time

from selfplay_jax import distributed, main, watch
from selfplay_jax.errors import Stopped, UserError

distributed._WAIT_FOR_PEERS_S = float(os.environ.get("PATIENCE", "60"))
watch._DEAD_S = 4.0  # a quiet test machine; the processes hold Python's lock for no second


def say(**what):
    print(json.dumps(what), flush=True)


def agree():
    """Values, errors, shares, and the arrays of a mesh that all processes share."""
    import jax
    import numpy as np

    from selfplay_jax import partitioning

    made = []
    value = distributed.agree(lambda: made.append(1) or {"list": [1, 2.5, None], "nan": float("nan")})
    nested = distributed.agree(lambda: distributed.agree(lambda: "inside"))
    try:
        distributed.agree(lambda: (_ for _ in ()).throw(UserError("the lead cannot")))
    except UserError as error:
        raised = str(error)
    mesh = partitioning.make_mesh()
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    placed = distributed.to_devices(rows, partitioning.rows(mesh))
    local = distributed.local_mesh(mesh)
    whole = distributed.localise(distributed.place(placed, partitioning.replicated(mesh)), local)
    try:
        stopped = distributed.each(lambda: distributed.Stop(lambda: distributed.index() == 1).check() or "done")
    except Stopped:
        stopped = "stopped"
    say(
        made=len(made), list=value["list"], nan=str(value["nan"]), nested=nested, raised=raised, stopped=stopped,
        gathered=distributed.gather(distributed.index()), mine=distributed.mine(list(range(5))),
        each=distributed.each(lambda: distributed.index()), lead=distributed.is_lead(),
        own=distributed.own_rows(partitioning.rows(mesh), 8).tolist(), total=float(jax.jit(jax.numpy.sum)(placed)),
        host=distributed.to_host(placed).tolist() == rows.tolist(), local=dict(local.shape),
        here=np.asarray(whole).tolist() == rows.tolist() and distributed.is_local(local),
        cache=jax.config.jax_enable_compilation_cache,
        across=dict(distributed.local_mesh(partitioning.make_mesh(1, -1)).shape),
    )  # fmt: skip


def steps():
    """A loop that waits for all at every step, until the stop."""
    from jax.experimental import multihost_utils

    stop = distributed.Stop(lambda: SIGNALS.asked)
    for step in range(100_000):
        if stop.at_step():
            say(stopped=step)
            raise Stopped
        multihost_utils.process_allgather(step)
        if step == 3:
            say(ready=True)


def apart():
    """Work that each does alone, of different lengths, until the stop."""
    stop = distributed.Stop(lambda: SIGNALS.asked)

    def work():
        say(ready=True)
        for _ in range(100 if distributed.index() else 100_000):
            time.sleep(0.01)
            stop.check()

    distributed.each(work)


def idle(where):
    """All but the lead are through with their work and wait for it, in C++, until the stop."""
    stop = distributed.Stop(lambda: SIGNALS.asked)

    def work():
        while distributed.is_lead():
            time.sleep(0.01)
            stop.check()

    distributed.barrier("begin")
    say(ready=True)
    distributed.each(work) if where == "each" else distributed.agree(work)


def wait():
    """The others wait for process 1, which never comes."""
    say(ready=True)
    if distributed.index() == 1:
        time.sleep(300)
    distributed.barrier("never")


def error():
    """Process 1 has a user's error while the others wait for it."""
    if distributed.index() == 1:
        raise UserError("the disk of this host is full")
    distributed.barrier("never")


def bug():
    """Process 1 has a bug."""
    if distributed.index() == 1:
        raise KeyError("no such thing")
    distributed.barrier("never")


def tokens(own=""):
    """The cache of tokens, in a folder that the processes share, or in one of each."""
    from selfplay_jax.data import builtin, cache
    from selfplay_jax.data.templates import Template, load_tokenizer

    written, write = [], cache._write
    cache._write = lambda *args: written.append(1) or write(*args)
    template = Template.from_tokenizer(load_tokenizer(str(builtin.BASE)), "auto", stop_ids=(1,))
    examples = builtin.examples("train", 20, 0)
    folder = f"{FOLDER}/cache_{distributed.index() if own else ''}"
    limits = {"max_prompt_tokens": 16, "max_response_tokens": 32, "overlong": "drop"}
    records, _ = cache.encode(examples, template, folder, **limits)
    again, _ = cache.encode(examples, template, folder, **limits)
    assert records == again
    say(written=len(written), tokens=[record.target for record in records])


def run(task, port, count, index, folder, *more):
    global FOLDER, SIGNALS
    FOLDER, SIGNALS = folder, main.Signals()
    say(started=True)
    try:
        distributed.initialise("auto", f"127.0.0.1:{port}", int(count), int(index), lambda: SIGNALS.asked)
        globals()[task](*more)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return distributed.leave(1, str(error))
    except Stopped:
        return distributed.leave(75)
    except Exception as error:
        distributed.failed(error, 70)
        raise
    return distributed.leave(0)


if __name__ == "__main__":
    sys.exit(run(*sys.argv[1:]))
