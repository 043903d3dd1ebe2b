"""How much memory a compiled program holds while it runs, and what for: from XLA's own schedule and buffers.

    live(t) = bytes of the temporary memory that some value occupies at instruction t, who is alive from the instruction
              that defines it to the last one that reads it

Instructions run in the order of the schedule; the body of a loop stands in it once. Arguments and results are not in
the temporary memory. Where XLA's packing leaves no gaps, the highest point is `temp_size_in_bytes`.
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from .hlo import Index, Instruction, Module, read

# What a buffer is for, by the innermost file of Python that it comes from; the first that fits.
CATEGORIES = {
    "attention": ("revjax/nn/flash", "revjax/nn/attention.py", "revjax/nn/rotary.py", "revjax/nn/cache.py"),
    "MLP": ("revjax/nn/mlp.py",),
    "loss": ("revjax/nn/cross_entropy.py",),
    "embedding": ("revjax/nn/embedding.py",),
    "norm": ("revjax/nn/norm.py",),
    "streams": ("revjax/core/", "revjax/models/"),
    "optimizer": ("/optax/", "revjax/training/"),
}
GRADIENTS, OTHER = "gradients", "other"


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A value in the temporary memory, alive from `start` to `end` (positions in the schedule, both included)."""

    name: str  # of the instruction that defines it
    shape: str  # "bf16[4,512,256]"
    offset: int
    bytes: int
    start: int
    end: int
    category: str
    line: str  # of Python, "revjax/nn/flash.py:120"; "" where it is not known


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the program that stands in no other, from `start` to `end`."""

    name: str  # "forward", "backward", "loss"
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """The buffers of a program over its schedule of `length` instructions."""

    buffers: tuple[Buffer, ...]
    loops: tuple[Loop, ...]
    length: int
    temp_bytes: int  # that XLA reserves

    def live(self, at: int) -> list[Buffer]:
        """The buffers that are alive at a position, largest first; of two with the same bytes, the later."""
        alive = sorted((b for b in self.buffers if b.start <= at <= b.end), key=lambda b: -b.start)
        found, taken = [], []
        for buffer in alive:
            free = buffer.bytes - _overlap(taken, buffer.offset, buffer.offset + buffer.bytes)
            if free > 0:
                found.append(dataclasses.replace(buffer, bytes=free))
                taken.append((buffer.offset, buffer.offset + buffer.bytes))
        return sorted(found, key=lambda b: -b.bytes)

    def by_category(self, at: int) -> dict[str, int]:
        """Bytes that are alive at a position, by what they are for."""
        sums = dict.fromkeys([*CATEGORIES, GRADIENTS, OTHER], 0)
        for buffer in self.live(at):
            sums[buffer.category] += buffer.bytes
        return sums

    def to_json(self) -> dict[str, Any]:
        """All of it, and the sums at every instruction, for `json.dump`."""
        sums = [self.by_category(at) for at in range(self.length)]
        live = {name: [each[name] for each in sums] for name in sums[0]} if sums else {}
        return dataclasses.asdict(self) | {"peak": self.peak(), "live": live}

    def peak(self) -> int:
        """The position with the most bytes alive; the first of several."""
        changes = sorted({b.start for b in self.buffers})
        return max(changes, key=lambda at: sum(b.bytes for b in self.live(at)), default=0)


def timeline(compiled: Any, params: Any = ()) -> Timeline:
    """The memory of a compiled program, `jax.jit(f).lower(...).compile()`, over its schedule.

    Args:
      params: parameters, or their shapes. What has a dtype and a shape of theirs counts as a gradient.

    Raises `ValueError` where XLA tells no buffers on this backend.
    """
    gradients = {_shape(x) for x in jax.tree.leaves(params) if x.ndim > 1}
    module = read(compiled)
    walk = _Walk.through(module)
    buffers = []
    for (id, index), slot in module.slots.items():
        if (id, index) not in walk.start:
            continue  # inside a fusion or a reduction: a few bytes
        instruction, start = walk.instructions[id], walk.start[id, index]
        category, line = walk.origin((id, index))
        shape = instruction.dtype_shape.get(index, "")
        category = GRADIENTS if shape in gradients else category
        end = max(walk.end.get((id, index), start), start)
        buffers.append(Buffer(instruction.name, shape, slot.offset, slot.size, start, end, category, line))
    return Timeline(tuple(buffers), tuple(walk.loops), walk.position, module.temp_bytes)


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an instruction comes from: what it is for, its line of Python, and the loop that it is in ("": none)."""

    opcode: str
    category: str
    line: str
    loop: str


def instruction_origins(compiled: Any) -> dict[str, Origin]:
    """Where each instruction of a compiled program comes from, by its name."""
    walk = _Walk.through(read(compiled))
    found = {}
    for id, at in walk.positions.items():
        instruction = walk.instructions[id]
        category, line = walk.origin((id, ()))
        loop = next((loop.name for loop in walk.loops if loop.start <= at < loop.end), "")
        if loop and line.startswith("revjax/training/step.py"):  # who asked for the loop, which is no update
            category = OTHER
        found[instruction.name] = Origin(instruction.opcode, category, line, loop)
    return found


def _shape(x: Any) -> str:
    dtype = jnp.dtype(x.dtype)
    name = {"bfloat16": "bf16", "bool": "pred"}.get(dtype.name, f"{dtype.kind}{8 * dtype.itemsize}")
    return f"{name}[{','.join(map(str, x.shape))}]"


Value = tuple[int, Index]  # the instruction that defines it, and where in its result


class _Walk:
    """Goes through the schedule, loops once, and notes when each value is defined and when it is last read."""

    def __init__(self, module: Module):
        self.module = module
        self.instructions = {i.id: i for c in module.computations.values() for i in c.instructions}
        self.position, self.depth = 0, 0
        self.positions: dict[int, int] = {}
        self.loops: list[Loop] = []
        self.start: dict[Value, int] = {}
        self.end: dict[Value, int] = {}
        self.reads: dict[Value, Value] = {}  # of a copy and of what a loop carries: what it was before
        self.reader: dict[Value, Value] = {}  # the first that reads it

    @staticmethod
    def through(module: Module) -> "_Walk":
        """A walk through the whole program."""
        walk, entry = _Walk(module), module.computations[module.entry]
        walk.run(entry.id, {i.id: {(): (i.id, ())} for i in entry.instructions if i.opcode == "parameter"})
        return walk

    def run(self, computation: int, values: dict[int, dict[Index, Value]]) -> dict[Index, Value]:
        """Runs a computation whose parameters have `values`; returns those of its result."""
        found = self.module.computations[computation]
        for instruction in found.instructions:
            self.positions[instruction.id] = self.position
            given = [values[i] for i in instruction.operands]
            result = values.get(instruction.id) or self._result(instruction, given)
            values[instruction.id] = result
            for value in (v for part in given for v in part.values() if result):
                self.reader.setdefault(value, next(iter(result.values())))
            if instruction.opcode in ("copy", "fusion") and not instruction.frame:
                largest = max((v for part in given for v in part.values()), key=self._bytes, default=None)
                if largest is not None:
                    self.reads.update({v: largest for v in result.values()})
            if instruction.opcode not in ("tuple", "get-tuple-element", "bitcast", "parameter"):
                for value in (v for operand in given for v in operand.values()):
                    self.end[value] = self.position
            self.position += 1
        root = values[found.root]
        for value in root.values():
            self.end[value] = self.position
        return root

    def _result(self, instruction: Instruction, given: list[dict[Index, Value]]) -> dict[Index, Value]:
        opcode = instruction.opcode
        if opcode in ("bitcast", "opt-barrier"):
            return given[0]
        if opcode == "tuple":
            return self._own(instruction) | {
                (i, *at): v for i, part in enumerate(given) for at, v in part.items() if at or v
            }
        if opcode == "get-tuple-element":
            return {at[1:]: v for at, v in given[0].items() if at[:1] == (instruction.tuple_index,)}
        if opcode == "while":
            return self._loop(instruction, given[0])
        if opcode in ("call", "conditional"):
            branches = [
                self.run(c, self._parameters(c, given if opcode == "call" else given[1:][k : k + 1]))
                for k, c in enumerate(instruction.called)
            ]
            return branches[0] | self._own(instruction) if opcode == "conditional" else branches[0]
        return self._own(instruction)

    def _loop(self, instruction: Instruction, init: dict[Index, Value]) -> dict[Index, Value]:
        """XLA gives what a loop changes a value of its own where it enters body and condition, and where it leaves."""
        begin, self.depth = self.position, self.depth + 1
        for computation in sorted(instruction.called, key=lambda c: len(self.module.computations[c].instructions)):
            self.run(computation, self._parameters(computation, [init]))
        self.depth -= 1
        if not self.depth:
            self.loops.append(Loop(self._name(instruction), begin, self.position))
        for value in init.values():  # what the loop does not change is there until its end
            self.end[value] = self.position
        own = self._own(instruction)
        self.reads.update({value: init[index] for index, value in own.items() if index in init})
        return init | own

    def _parameters(self, computation: int, given: list[dict[Index, Value]]) -> dict[int, dict[Index, Value]]:
        parameters = [i for i in self.module.computations[computation].instructions if i.opcode == "parameter"]
        values = {}
        for parameter in parameters:
            before, own = given[parameter.parameter], self._own(parameter)
            self.reads.update({value: before[index] for index, value in own.items() if index in before})
            values[parameter.id] = before | own
        return values

    def _own(self, instruction: Instruction) -> dict[Index, Value]:
        """The values that the instruction itself defines, from now on alive."""
        indices = {index for index in instruction.dtype_shape} | {()}
        own = {index: (instruction.id, index) for index in indices if (instruction.id, index) in self.module.slots}
        for value in own.values():
            self.start.setdefault(value, self.position)
        return own

    def _name(self, loop: Instruction) -> str:
        if loop.frame and self._category(loop.frame)[0] == "loss":
            return "loss"
        return "backward" if "transpose" in loop.op_name else "forward"

    def _bytes(self, value: Value) -> int:
        return self.module.slots[value].size if value in self.module.slots else 0

    def origin(self, value: Value) -> tuple[str, str]:
        """What a value is for, and the line of Python it comes from; where XLA does not say, of its first reader."""
        vague = 0
        for links in (self.reads, self.reader):
            seen, at = set(), value
            while at not in seen:
                seen.add(at)
                frame = self._frame(self.instructions[at[0]])
                if frame and (links is self.reader or at not in self.reads):
                    if not self._is_vague(frame) or self._is_integer(at):
                        return self._category(frame)
                    vague = vague or frame
                at = links.get(at, at)
        return self._category(vague) if vague else (OTHER, "")

    def _frame(self, instruction: Instruction) -> int:
        inside = [i.frame for c in instruction.called for i in self.module.computations[c].instructions if i.frame]
        frames = [instruction.frame] * bool(instruction.frame) + inside[::-1] * (instruction.opcode == "fusion")
        if not frames or self._is_integer((instruction.id, ())):
            return frames[0] if frames else 0
        return next((frame for frame in frames if not self._is_vague(frame)), frames[0])

    def _is_integer(self, value: Value) -> bool:
        """Whether it is made of 32-bit integers: where nothing better is known, a stream or one on its way."""
        shape = self.instructions[value[0]].dtype_shape.get(value[1], "")
        return shape.startswith(("s32[", "u32["))

    def _is_vague(self, frame: int) -> bool:
        """Whether it is the call of a loop over layers, which is all that jax tells of operations of its own."""
        file, _ = next(self.module.stack(frame))
        return file.endswith(("revjax/core/scan.py", "revjax/core/forward.py", "revjax/core/backward.py"))

    def _category(self, frame: int) -> tuple[str, str]:
        frames = list(self.module.stack(frame))
        for file, line in frames:
            for category, fragments in CATEGORIES.items():
                if any(fragment in file for fragment in fragments):
                    return category, f"{_short(file)}:{line}"
        file, line = frames[0]
        return OTHER, f"{_short(file)}:{line}"


def _short(file: str) -> str:
    parts = pathlib.PurePath(file).parts
    roots = [i for i, part in enumerate(parts) if part in ("revjax", "optax", "jax", "flax")]
    return "/".join(parts[roots[-1] :] if roots else parts[-2:])


def _overlap(taken: list[tuple[int, int]], start: int, stop: int) -> int:
    """How many bytes of [start, stop) are taken."""
    covered, at = 0, start
    for a, b in sorted((max(a, start), min(b, stop)) for a, b in taken if a < stop and b > start):
        covered += max(b - max(a, at), 0)
        at = max(at, b)
    return covered
