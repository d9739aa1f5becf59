"""The host side of sampling: queues prompts, keeps the slots full, hands back responses in the prompts' order."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from selfplay_jax import distributed, partitioning
from selfplay_jax.groups import bucket, pad_rows
from selfplay_jax.models.decoder import CACHE_AXES, Model, Params
from selfplay_jax.sampling import slots as device
from selfplay_jax.sampling.filters import SamplingFilter

# Tokens that a slot decodes between two looks of `stop_when`.
_LOOK_EVERY = 16


class Samples(NamedTuple):
    """Responses in the order of the prompts.

    tokens: N lists of token ids, the stop token included where there is one; lengths [N] int32;
    finished [N] bool: ended by a stop token (or by `stop_when`), not cut at max_new_tokens;
    logps [N] float32: log π(response | prompt) at temperature 1, without filters, in nats; NaN where `stop_when` ended
    the response (the sum then runs over some tokens more).
    """

    tokens: list[list[int]]
    lengths: np.ndarray
    finished: np.ndarray
    logps: np.ndarray


class _Programs(NamedTuple):
    empty: Callable[[], device.Slots]
    fill: Callable[[Params, device.Slots, device.Refill], device.Slots]
    decode: Callable[[Params, device.Slots, np.int32, np.int32 | None], device.Slots]
    keys: Callable[..., jax.Array]


def _slot_axes(state: device.Slots) -> device.Slots:
    """The logical axes of the slots' state."""
    rows = jax.tree.map(lambda leaf: ("batch",)[: leaf.ndim] + (None,) * (leaf.ndim - 1), state)
    return rows._replace(cache=jax.tree.map(lambda leaf: CACHE_AXES, state.cache))


def _slot_shardings(state: device.Slots, mesh: Mesh) -> Any:
    """Where the slots' state lies; on TPUs with the cache in the order that the decode loop computes in.

    With the cache in its default order the loop copies all of it, on its way in and out.
    """
    shardings = partitioning.tree_shardings(_slot_axes(state), state, mesh)
    if mesh.devices.flat[0].platform != "tpu":
        return shardings
    order = Layout(major_to_minor=(0, 3, 2, 1, 4))
    return shardings._replace(cache=jax.tree.map(lambda leaf: Format(order, leaf), shardings.cache))


def _fill(model: Model, state: device.Slots, mesh: Mesh, rules: partitioning.Rules) -> Callable[..., device.Slots]:
    """`slots.fill` where each device prefills the prompts of its own slots: no keys and values travel."""
    specs = partitioning.over_rows_specs(_slot_axes(state), state, mesh)
    fill = functools.partial(device.fill, model)
    return partitioning.over_rows(
        fill, mesh, (model.row_specs(mesh, rules), specs, partitioning.rows(mesh).spec), specs
    )


def _rules(params: Params) -> str:
    """The name of the rules that parameters on a mesh lie by: RULES where they are cut over fsdp."""
    cut = any("fsdp" in jax.tree.leaves(tuple(leaf.sharding.spec)) for leaf in jax.tree.leaves(params))
    return "RULES" if cut else "DECODE_RULES"


@functools.lru_cache(maxsize=32)
def _programs(
    model: Model,
    choose: SamplingFilter,
    stop_ids: tuple[int, ...],
    slots: int,
    columns: int,
    max_new_tokens: int,
    mesh: Mesh | None,
    rules: str = "DECODE_RULES",
) -> _Programs:
    """The jitted pieces for one set of shapes; prompts of another bucket compile only `fill` anew."""
    empty = functools.partial(device.empty, model, slots, columns, max_new_tokens)
    fill: Callable[..., device.Slots] = functools.partial(device.fill, model)
    shardings: Any = None
    if mesh is not None:
        state = jax.eval_shape(empty)
        shardings = _slot_shardings(state, mesh)
        fill = _fill(model, state, mesh, getattr(partitioning, rules))

    def keys(seed: np.ndarray, round_index: np.ndarray, ids: np.ndarray, copies: np.ndarray) -> jax.Array:
        base = jax.random.fold_in(jax.random.key(seed), round_index)
        return jax.vmap(lambda i, c: jax.random.fold_in(jax.random.fold_in(base, i), c))(ids, copies)

    return _Programs(
        empty=jax.jit(empty, out_shardings=shardings),
        fill=jax.jit(fill, donate_argnums=1, in_shardings=(None, shardings, None), out_shardings=shardings),
        decode=jax.jit(
            functools.partial(device.decode, model, choose, stop_ids),
            donate_argnums=1,
            in_shardings=(None, shardings, None, None),
            out_shardings=shardings,
        ),
        keys=jax.jit(keys),
    )


def _stops_at(
    stop_when: Callable[[list[int]], bool],
    filled: np.ndarray,
    drawn: np.ndarray,
    counts: np.ndarray,
    looked: np.ndarray,
) -> np.ndarray:
    """By slot, the length of the shortest prefix of its tokens that `stop_when` ends; 0 where there is none.

    filled [B] bool; drawn [B, N]; counts [B]: tokens so far; looked [B]: how many of them `stop_when` has let pass.
    """
    lengths = np.zeros_like(counts)
    for slot in np.flatnonzero(filled):
        tokens = drawn[slot, : counts[slot]].tolist()
        if stop_when(tokens):
            shorter = (n for n in range(looked[slot] + 1, len(tokens)) if stop_when(tokens[:n]))
            lengths[slot] = next(shorter, len(tokens))
    return lengths


def _places(free: np.ndarray, slots: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the `free` slots are filled next, and by which rows of the prefill.

    Each device has `slots` slots and prefills `width` rows for them, its own alone.
    """
    shard = free // slots
    rank = np.arange(len(free)) - np.searchsorted(shard, shard)  # the how-manieth free slot of its device
    chosen = rank < width
    return free[chosen], shard[chosen] * width + rank[chosen]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def sizes(slots: int, longest: int, max_new_tokens: int, mesh: Mesh | None) -> tuple[int, int, int]:
    """(slots, prompts that enter together, columns of the cache) for prompts of up to `longest` tokens on a mesh."""
    shards = 1 if mesh is None else partitioning.data_shards(mesh)
    slots = _round_up(slots, shards)
    columns = bucket(longest) + max_new_tokens
    columns = _round_up(columns, 1 if mesh is None else mesh.shape.get("tensor", 1))  # see "cache_columns"
    return slots, _round_up(max(1, slots // 4), shards), columns


def generate(
    model: Model,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    max_new_tokens: int,
    stop_ids: Sequence[int] | None = None,
    prompt_ids: Sequence[int] | None = None,
    samples_per_prompt: int = 1,
    round_index: int = 0,
    slots: int = 64,
    max_prompt_tokens: int | None = None,
    mesh: Mesh | None = None,
    on_progress: Callable[[int], None] | None = None,
    stop_when: Callable[[list[int]], bool] | None = None,
) -> Samples:
    """Samples a response to each prompt.

    A prompt's sample depends on (seed, round_index, its prompt id, the copy's number) alone: not on the other prompts,
    their order, `slots` or the mesh, up to floating-point ties.

    Args:
      prompts: lists of token ids, one token at least each.
      temperature, top_k, top_p: see `SamplingFilter`; temperature 0 is greedy.
      max_new_tokens: responses are cut there, without an invented stop token.
      stop_ids: tokens that end a response (kept as its last token); by default the model's.
      prompt_ids: non-negative numbers that name the prompts for the random stream; by default their position.
      samples_per_prompt: copies of each prompt; the answers to prompt i are entries i*S .. i*S + S - 1.
      slots: rows decoded together (fewer for fewer prompts).
      max_prompt_tokens: the longest prompt to make room for; by default the longest given. Calls with the same value
      share their compiled programs.
      mesh: where the parameters live; None is a single device.
      on_progress: called with the number of responses finished since the last call.
      stop_when: says of a response's tokens so far whether to end there (stop strings, say); must stay True for longer
      ones. Asked on the host every few tokens; the response ends where it first holds, wherever the host looked.
    Raises:
      ValueError: an empty prompt, a prompt longer than max_prompt_tokens, or a setting out of range.
    """
    choose = SamplingFilter(temperature, top_k, top_p)
    if max_new_tokens < 1 or samples_per_prompt < 1 or slots < 1:
        raise ValueError("max_new_tokens, samples_per_prompt and slots must be at least 1")
    total = len(prompts) * samples_per_prompt
    if total == 0:
        return Samples([], np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32))
    longest = max(len(prompt) for prompt in prompts)
    if min(len(prompt) for prompt in prompts) == 0:
        raise ValueError("a prompt is empty; it needs one token at least")
    if max_prompt_tokens is not None and longest > max_prompt_tokens:
        raise ValueError(f"a prompt has {longest} tokens, max_prompt_tokens is {max_prompt_tokens}")

    ids = np.arange(len(prompts)) if prompt_ids is None else np.asarray(prompt_ids)
    stops = tuple(model.config.stop_ids if stop_ids is None else stop_ids)
    shards = 1 if mesh is None else partitioning.data_shards(mesh)
    slots, width, columns = sizes(min(slots, total), max_prompt_tokens or longest, max_new_tokens, mesh)
    rules = "DECODE_RULES" if mesh is None else _rules(params)
    programs = _programs(model, choose, stops, slots, columns, max_new_tokens, mesh, rules)

    # Neighbours in length enter together, so that a refill is padded little.
    prompt_of = np.repeat(np.arange(len(prompts)), samples_per_prompt)
    copy_of = np.tile(np.arange(samples_per_prompt), len(prompts))
    queue: list[int] = np.argsort([len(prompts[p]) for p in prompt_of.tolist()], kind="stable")[::-1].tolist()

    tokens: list[list[int]] = [[] for _ in range(total)]
    finished, logps = np.zeros(total, bool), np.zeros(total, np.float32)
    owner = np.full(slots, -1)
    looked = np.zeros(slots, np.int32)  # tokens of each slot's response that `stop_when` has let pass

    with partitioning.use_mesh(mesh):
        state = programs.empty()
        while queue or (owner >= 0).any():
            free = np.flatnonzero(owner < 0)
            if len(free) < min(width, len(queue)):
                free = free[:0]  # after a look of `stop_when`: too few for a prefill, they wait for company
            while queue and len(free):
                into, places = _places(free, slots // shards, width // shards)
                into, places = into[: len(queue)], places[: len(queue)]
                entering, queue = queue[: len(into)], queue[len(into) :]
                free = np.setdiff1d(free, into)
                owner[into] = entering
                looked[into] = 0
                source = np.full(slots, -1, np.int32)
                source[into] = places % (width // shards)  # counted on the slot's own device
                rows: list[Sequence[int]] = [[0]] * width
                for place, i in zip(places, entering, strict=True):
                    rows[place] = prompts[prompt_of[i]]
                padded, lengths = pad_rows(rows, bucket(max(len(row) for row in rows)))
                spread = np.zeros((2, width), np.uint32)
                spread[:, places] = ids[prompt_of[entering]], copy_of[entering]
                keys = programs.keys(np.uint32(seed), np.uint32(round_index), *spread)
                state = programs.fill(params, state, device.Refill(jnp.asarray(source), padded, lengths, keys))
            enough = np.int32(width if queue else slots)
            state = programs.decode(params, state, enough, None if stop_when is None else np.int32(_LOOK_EVERY))
            busy, ended, sums, counts, drawn = distributed.to_host(
                (state.busy, state.finished, state.logps, state.produced, state.tokens)
            )
            if stop_when is not None:
                stops_at = _stops_at(stop_when, owner >= 0, drawn, counts, looked)
                told, looked = stops_at > 0, counts.copy()
                busy, ended = busy & ~told, ended | told
                sums, counts = np.where(told, np.float32(np.nan), sums), np.where(told, stops_at, counts)
                if told.any():
                    state = state._replace(busy=distributed.to_devices(busy, state.busy.sharding))
            done = np.flatnonzero((owner >= 0) & ~busy)
            for slot in done:
                tokens[owner[slot]] = drawn[slot, : counts[slot]].tolist()
                finished[owner[slot]], logps[owner[slot]] = ended[slot], sums[slot]
            owner[done] = -1
            if on_progress is not None:
                on_progress(len(done))
    return Samples(tokens, np.array([len(t) for t in tokens], np.int32), finished, logps)
