"""What the optimised program of the TPU compiler says of time: estimated cycles, and the bytes of its collectives.

The text is read line by line. Loops count as often as they run: a loop whose condition compares a counter with a
constant is a scan; of any other (decoding until enough slots are done) one iteration is counted, apart from the rest.
With several slices the program is one slice's: its collectives stay within it, and what crosses is sent by way of the
host ("megascale").
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "c64": 8, "c128": 16}
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast)(-start)?$"
)
_ACROSS = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_CALLED = re.compile(r"\b(calls|to_apply|condition|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device does in one run of a program, or of one iteration of its unbounded loop.

    cycles: of everything but collectives and Pallas kernels, the compiler's estimate. ici_bytes, dcn_bytes: sent by the
    device within its slice and to other slices. collectives: how many run, by kind.
    """

    cycles: float = 0.0
    ici_bytes: float = 0.0
    dcn_bytes: float = 0.0
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Traffic") -> "Traffic":
        kinds = sorted(self.collectives | other.collectives)
        return Traffic(
            self.cycles + other.cycles,
            self.ici_bytes + other.ici_bytes,
            self.dcn_bytes + other.dcn_bytes,
            {kind: self.collectives.get(kind, 0) + other.collectives.get(kind, 0) for kind in kinds},
        )


@dataclasses.dataclass
class _Instruction:
    name: str
    shape: str
    opcode: str
    rest: str


def read(text: str, *, devices: int, slices: int) -> tuple[Traffic, Traffic]:
    """(what runs once, one iteration of the unbounded loop if there is one) of a compiled program's text.

    devices: those of one slice.
    """
    computations, entry = _computations(text)
    once, repeated = _Tally(devices, slices), _Tally(devices, slices)

    def visit(name: str, times: float, unbounded: bool, inside: str) -> None:
        tally = repeated if unbounded else once
        for instruction in computations.get(name, ()):
            tally.add(instruction, times, inside)
            if instruction.opcode == "while":
                called = dict(_CALLED.findall(instruction.rest))
                length = _length(computations.get(called.get("condition", ""), []))
                visit(called["body"], times * (length or 1), unbounded or length is None, inside)
                continue
            if instruction.opcode in ("async-update", "async-done"):  # what async-start began
                continue
            for kind, inner in _CALLED.findall(instruction.rest):
                if kind != "to_apply":  # the sum of a reduction
                    visit(inner, times, unbounded, inner)
            for branches in _BRANCHES.findall(instruction.rest):
                for inner in branches.split(","):
                    visit(inner.strip().lstrip("%"), times, unbounded, inside)

    visit(entry, 1.0, False, entry)
    return once.total(), repeated.total()


class _Tally:
    """Sums over instructions. The pieces of one asynchronous collective share channel and shape, and count once."""

    def __init__(self, devices: int, slices: int):
        self._devices, self._slices = devices, slices
        self._cycles = 0.0
        self._sent: dict[str, tuple[str, float, float, float]] = {}

    def add(self, instruction: _Instruction, times: float, inside: str) -> None:
        match = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
        self._cycles += times * int(match.group(1)) if match else 0.0
        kind = _COLLECTIVE.match(instruction.opcode)
        across = _ACROSS.search(instruction.rest) if instruction.opcode == "send" else None
        if kind:
            name, ici = self._within(kind.group(1), bool(kind.group(2)), instruction, inside)
            dcn = 0.0
        elif across:
            name, ici = f"across slices: {across.group(1).lower()}", 0.0
            dcn = self._across(across.group(1), instruction)
        else:
            return
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        where = channel.group(1) if channel else f"{inside}/{instruction.name}"
        key = f"{instruction.opcode}/{where}/{list(_arrays(instruction.shape))}"
        if key not in self._sent or self._sent[key][1] < times:
            self._sent[key] = (name, times, ici * times, dcn * times)

    def _within(self, kind: str, started: bool, instruction: _Instruction, inside: str) -> tuple[str, float]:
        """(kind, bytes that a device sends) of a collective within the slice, run as rings."""
        size = 2 if kind == "collective-permute" else len(replica_groups(instruction.rest, self._devices)[0])
        payload = _size(instruction.shape)
        if kind == "collective-permute":
            return kind, payload / 2 if started else payload
        if kind == "all-reduce" and inside.startswith("all-reduce-scatter"):  # the TPU compiler's reduce-scatter
            return "reduce-scatter", payload * (size - 1) / size
        if kind == "all-gather" and started:  # its result holds the operand too
            payload *= size / (size + 1)
        if kind == "reduce-scatter":
            payload *= size
        return kind, (2 if kind == "all-reduce" else 1) * payload * (size - 1) / size

    def _across(self, kind: str, instruction: _Instruction) -> float:
        """Bytes that a device's host sends to other slices for it: each slice ends with, or sends, equal shares."""
        array = next(_arrays(instruction.shape))
        payload = _size(f"{array[0]}[{array[1]}]")
        others = self._slices - 1
        factors = {"ALL_REDUCE": 2 * others / self._slices, "ALL_GATHER": others}
        if kind in ("REDUCE_SCATTER", "ALL_TO_ALL"):
            return payload * others / self._slices
        return payload * factors.get(kind, 1.0)

    def total(self) -> Traffic:
        counts: dict[str, int] = {}
        for kind, times, _, _ in self._sent.values():
            counts[kind] = counts.get(kind, 0) + round(times)
        sent = self._sent.values()
        return Traffic(self._cycles, sum(s[2] for s in sent), sum(s[3] for s in sent), dict(sorted(counts.items())))


def replica_groups(rest: str, devices: int) -> list[list[int]]:
    """The groups of a collective from its text: {{0,1},{2,3}}, [2,4]<=[4,2]T(1,0), or mesh['a'=2,'b'=4] {'b'}."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}", rest)
    if mesh:
        return _of_mesh(*mesh.groups())
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, dims, order = ([int(n) for n in part.split(",")] if part else None for part in iota.groups())
        assert shape is not None and dims is not None
        return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(shape).tolist()
    listed = re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest)
    assert listed or not re.search(r"replica_groups=[^{]|replica_groups=\{[^}]", rest), rest  # none, or {}: all devices
    return _explicit(listed.group(1)) if listed else [list(range(devices))]


def _of_mesh(axes: str, ids: str | None, over: str) -> list[list[int]]:
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    names, shape = list(sizes), list(sizes.values())
    order = np.arange(math.prod(shape))
    iota = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids or "")
    if iota:
        dims = [int(n) for n in iota.group(1).split(",")]
        turn = [int(n) for n in iota.group(2).split(",")] if iota.group(2) else None
        order = order.reshape(dims).transpose(turn).reshape(-1)
    # 'a':(2)4 is the part of axis a of size 4 that has parts of product 2 before it.
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)
    split: list[int] = []
    chosen: list[int] = []
    for name, size in zip(names, shape, strict=True):
        pieces = sorted((int(before or 1), int(part or size)) for axis, before, part in parts if axis == name)
        left = 1
        for before, part in pieces:
            if before > left:
                split.append(before // left)
            chosen.append(len(split))
            split.append(part)
            left = before * part
        if left < size:
            split.append(size // left)
    grid = order.reshape(split)
    rest = [axis for axis in range(grid.ndim) if axis not in chosen]
    return grid.transpose(*rest, *chosen).reshape(-1, math.prod(split[axis] for axis in chosen)).tolist()


def _explicit(text: str) -> list[list[int]]:
    return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", text)]


def _computations(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    found: dict[str, list[_Instruction]] = {}
    current: list[_Instruction] = []
    entry = ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            header = _HEADER.match(line)
            if header:
                current = found.setdefault(header.group(2), [])
                entry = header.group(2) if header.group(1) else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if instruction:
            shape, _, tail = _shape_and_rest(instruction.group(2))
            opcode, _, rest = tail.partition("(")
            current.append(_Instruction(instruction.group(1), shape, opcode, rest))
    return found, entry


def _shape_and_rest(text: str) -> tuple[str, str, str]:
    if not text.startswith("("):
        return text.partition(" ")
    depth = 0
    for index, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[: index + 1], " ", text[index + 2 :]
    return text, "", ""


def _length(condition: list[_Instruction]) -> int | None:
    """How often a loop runs whose condition is `counter < constant`, else None."""
    constants = {i.name: int(i.rest.rstrip(")").split(")")[0]) for i in condition if _is_integer(i)}
    counters = {i.name for i in condition if i.opcode == "get-tuple-element"}
    root = condition[-1] if condition else None
    if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    names = re.findall(r"%?([\w.\-]+)", root.rest.partition(")")[0])
    if len(names) == 2 and names[0] in counters and names[1] in constants:
        return constants[names[1]]
    return None


def _is_integer(instruction: _Instruction) -> bool:
    return instruction.opcode == "constant" and re.match(r"-?\d+\)", instruction.rest) is not None


def _size(shape: str) -> float:
    """Bytes of a shape such as f32[2,3]{1,0} or of a tuple of them."""
    return sum(_element(kind) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in _arrays(shape))


def _arrays(shape: str) -> Iterator[tuple[str, str]]:
    for match in re.finditer(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
        yield match.group(1), match.group(2)


def _element(kind: str) -> float:
    if kind in _BYTES:
        return _BYTES[kind]
    if kind.startswith("f8"):
        return 1
    bits = re.match(r"[fsu](\d+)$", kind)
    return int(bits.group(1)) / 8 if bits else 0
