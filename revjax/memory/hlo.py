"""What XLA says of a compiled program: its schedule, its buffers, and from which line of Python each comes.

Read from two serialized messages (xla/service/hlo.proto and buffer_assignment.proto) by the numbers of their fields,
since jax has no Python classes for them. Only what `timeline` needs is read.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

Index = tuple[int, ...]  # where in a tuple of tuples; () where there is none


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; of a fusion, the whole."""

    id: int
    name: str
    opcode: str
    operands: tuple[int, ...]
    called: tuple[int, ...]  # computations
    tuple_index: int  # of get-tuple-element
    parameter: int  # which one it is
    dtype_shape: dict[Index, str]  # "bf16[4,512,256]", for each array of the result
    op_name: str  # the path of transformations, "jit(step)/transpose(jvp())/while/body/dot_general"
    frame: int  # the innermost line of Python that it comes from, for `Module.stack`; 0 is unknown


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    id: int
    instructions: tuple[Instruction, ...]
    root: int


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a value lives in the program's temporary memory, in bytes from its beginning."""

    offset: int
    size: int


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      slots: where in the temporary memory each value is that is there, by the instruction that defines it and the index
        in its result. Several values may have the same bytes, one after another.
      temp_bytes: of the temporary memory.
      parents: the file, the line and the calling frame of each frame.
    """

    computations: dict[int, Computation]
    entry: int
    slots: dict[tuple[int, Index], Slot]
    temp_bytes: int
    parents: dict[int, tuple[str, int, int]]

    def stack(self, frame: int) -> Iterator[tuple[str, int]]:
        """(file, line) from the innermost call outwards."""
        while frame in self.parents:
            file, line, frame = self.parents[frame]
            yield file, line


def read(compiled: Any) -> Module:
    """Reads a compiled program, `jax.jit(f).lower(...).compile()`. Raises `ValueError` where XLA tells no buffers."""
    buffers = getattr(compiled.memory_analysis(), "serialized_buffer_assignment_proto", None)
    modules = compiled.runtime_executable().hlo_modules()
    if not buffers or len(modules) != 1:
        raise ValueError("XLA tells no buffers of this program on this backend.")
    module = _grouped(modules[0].as_serialized_hlo_module_proto())
    order = {}
    for entry in _grouped(*module[7])[1]:
        pair = _grouped(entry)
        order[_one(pair, 1)] = [i for packed in _grouped(*pair[2])[1] for i in _ints(packed)]
    computations = [_computation(_grouped(c), order) for c in module[3]]
    slots, temp_bytes = _slots(_grouped(buffers))
    return Module({c.id: c for c in computations}, _one(module, 6), slots, temp_bytes, _frames(module))


def _computation(fields: dict[int, list], order: dict[int, list[int]]) -> Computation:
    instructions = {i.id: i for i in map(_instruction, fields[2])}
    id = _one(fields, 5)
    ordered = tuple(instructions[i] for i in order.get(id, instructions))
    return Computation(id, ordered, _one(fields, 6))


def _instruction(message: bytes) -> Instruction:
    fields = _grouped(message)
    metadata = _grouped(*fields[7]) if fields[7] else defaultdict(list)
    return Instruction(
        id=_one(fields, 35),
        name=_one(fields, 1, b"").decode(),
        opcode=_one(fields, 2, b"").decode(),
        operands=tuple(i for packed in fields[36] for i in _ints(packed)),
        called=tuple(i for packed in fields[38] for i in _ints(packed)),
        tuple_index=_one(fields, 13),
        parameter=_one(fields, 9),
        dtype_shape=dict(_shapes(fields[3][0])),
        op_name=_one(metadata, 2, b"").decode(),
        frame=_one(metadata, 15),
    )


# xla_data.proto, PrimitiveType
_DTYPES = {1: "pred", 2: "s8", 3: "s16", 4: "s32", 5: "s64", 6: "u8", 7: "u16", 8: "u32", 9: "u64", 10: "f16"}
_DTYPES |= {11: "f32", 12: "f64", 16: "bf16", 17: "token"}


def _shapes(message: bytes, index: Index = ()) -> Iterator[tuple[Index, str]]:
    fields = _grouped(message)
    for i, part in enumerate(fields[4]):
        yield from _shapes(part, (*index, i))
    if not fields[4]:
        dtype = _DTYPES.get(_one(fields, 2), "?")
        yield index, f"{dtype}[{','.join(str(n) for packed in fields[3] for n in _ints(packed))}]"


def _slots(fields: dict[int, list]) -> tuple[dict[tuple[int, Index], Slot], int]:
    where = {}
    for message in fields[1]:  # logical buffers
        buffer = _grouped(message)
        location = _grouped(*buffer[3])
        index = tuple(i for packed in location[3] for i in _ints(packed))
        where[_one(buffer, 1)] = (_one(location, 4), index)
    slots, total = {}, 0
    for message in fields[3]:  # allocations
        allocation = _grouped(message)
        thread_local, parameter, live_out, constant = (_one(allocation, n) for n in (3, 5, 7, 12))
        if thread_local or parameter or live_out or constant:
            continue
        start, total = total, total + _one(allocation, 2)
        for assigned in map(_grouped, allocation[9]):
            slots[where[_one(assigned, 1)]] = Slot(start + _one(assigned, 2), _one(assigned, 3))
    return slots, total


def _frames(module: dict[int, list]) -> dict[int, tuple[str, int, int]]:
    if not module[17]:
        return {}
    fields = _grouped(*module[17])
    files = [name.decode() for name in fields[1]]
    places = [_grouped(message) for message in fields[3]]
    frames = {}
    for i, message in enumerate(fields[4], 1):
        frame = _grouped(message)
        place = places[_one(frame, 1) - 1]
        frames[i] = (files[_one(place, 1) - 1], _one(place, 3), _one(frame, 2))
    return frames


# The wire format: a message is a list of (number of the field, value); protobuf.dev/programming-guides/encoding.


def _grouped(message: bytes) -> dict[int, list]:
    """The values of each field, in order."""
    fields: dict[int, list] = defaultdict(list)
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(message, at)
        elif wire == 2:
            size, at = _varint(message, at)
            value, at = message[at : at + size], at + size
        else:
            size = {1: 8, 5: 4}[wire]
            value, at = message[at : at + size], at + size
        fields[key >> 3].append(value)
    return fields


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at


def _ints(packed: int | bytes) -> Iterator[int]:
    """A repeated number, packed or not."""
    if isinstance(packed, int):
        yield packed
        return
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _one(fields: dict[int, list], number: int, default: Any = 0) -> Any:
    return fields[number][-1] if fields[number] else default
