"""What a compiled program says of itself: its collectives and, on TPUs, the compiler's estimates of time.

All of it is read from the text of the optimised program (`compiled.as_text()`); what is in a loop counts once for each
of its iterations.
"""

from __future__ import annotations

import dataclasses
import math
import re

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices."""

    kind: str
    """One of `COLLECTIVES`."""
    bytes: int
    """The bytes of its operand or its result, whichever is larger, on one device."""
    group: int
    """How many devices take part in it together; 0: unknown."""
    times: int
    """How often it runs in one call of the program."""
    overlapped: bool
    """Whether the compiler runs it beside other work."""
    source: str
    """The operation that it serves, as JAX names it."""

    @property
    def sent(self) -> float:
        """The bytes that a device sends in all calls, if the exchange goes round a ring."""
        share = 1.0 if self.group < 2 else (self.group - 1) / self.group
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class Operation:
    """An operation with the compiler's estimate of its time."""

    cycles: int
    """The cycles of one run; 0 for a kernel written by hand."""
    times: int
    source: str
    text: str


@dataclasses.dataclass(frozen=True)
class Program:
    """What a program's text tells."""

    collectives: list[Collective]
    operations: list[Operation]

    @property
    def cycles(self) -> int:
        """The cycles of all operations, one after the other; collectives and kernels written by hand have none."""
        return sum(op.cycles * op.times for op in self.operations)


def read_program(text: str) -> Program:
    """Reads the collectives and the operations of a program from its text."""
    entry, computations = _computations(text)
    collectives: list[Collective] = []
    operations: list[Operation] = []

    seen: set[str] = set()

    def visit(name: str, times: int, inside: bool) -> None:
        """Visits a computation; `inside` a fusion, operations have no time of their own."""
        for line in computations.get(name, ()):
            if (match := _INSTRUCTION.match(line)) is None:
                continue
            result, opcode, rest = match.groups()
            source = _first(r'op_name="([^"]*)"', line)
            kind = opcode.removesuffix("-start")
            # On TPUs, a collective that runs beside several operations is in each of them, with the same chain_id.
            chain = _first(r'chain_id="(\d+)"', line)
            if kind in COLLECTIVES and chain not in seen:
                seen.update({chain} - {""})
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                size = max(_bytes(result, opcode != kind), _operand_bytes(rest))
                overlapped = bool(chain) or opcode.endswith("-start")
                collectives.append(Collective(kind, size, _group(line), times, overlapped, source))
            elif 'custom_call_target="tpu_custom_call"' in line:
                operations.append(Operation(0, times, source, line.strip()))
            cycles = int(_first(r'"estimated_cycles":"(\d{1,15})"', line) or 0)  # a longer number means unknown
            if cycles and not inside:
                operations.append(Operation(cycles, times, source, line.strip()))
            if opcode == "while":
                iterations = _iterations(line, computations)
                visit(_first(r"body=%?([\w.\-]+)", line), times * iterations, inside)
            elif called := _called(line):
                for one in called:
                    visit(one, times, inside or opcode == "fusion")

    visit(entry, 1, False)
    return Program(collectives, operations)


_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z][\w\-]*)\((.*)$")
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+(?:e\d+m\d+\w*)?)\[([\d,]*)\]")


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    """Returns the name of the entry, and the lines of each computation by its name."""
    entry, name, computations = "", "", {}
    for line in text.splitlines():
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            name, computations[match[2]] = match[2], []
            entry = name if match[1] else entry
        elif line == "}":
            name = ""
        elif line.startswith("  ") and name:
            computations[name].append(line)
        elif name and computations[name]:
            computations[name][-1] += line  # an attribute with a line break in it
    return entry, computations


def _called(line: str) -> list[str]:
    names = re.findall(r"(?:calls|to_apply|called_computations|async_execution_thread_calls)=\{?%?([\w.\-]+)", line)
    branches = _first(r"branch_computations=\{([^}]*)\}", line)
    return [*names, *re.findall(r"%?([\w.\-]+)", branches)]


def _iterations(line: str, computations: dict[str, list[str]]) -> int:
    """Returns a loop's iterations: as the compiler wrote them, or the constant that its counter is compared with."""
    if known := _first(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known)
    condition = "\n".join(computations.get(_first(r"condition=%?([\w.\-]+)", line), ()))
    bounds = [int(n) for n in re.findall(r"s32\[\][^=]*? constant\((\d+)\)", condition)]
    return max(bounds, default=1)


def shapes(text: str) -> list[tuple[int, ...]]:
    """Returns the shapes of all arrays that a piece of a program names."""
    return [tuple(map(int, filter(None, dims.split(",")))) for _, dims in _SHAPE.findall(text)]


def _bytes(text: str, largest: bool = False) -> int:
    """Returns the bytes of all arrays of a type, or of the largest: a started operation's type has its operand too."""
    kinds = [kind for kind, _ in _SHAPE.findall(text)]
    sizes = [math.prod(shape) * _width(kind) for shape, kind in zip(shapes(text), kinds)]
    return max(sizes, default=0) if largest else sum(sizes)


def _operand_bytes(operands: str) -> int:
    return _bytes(operands.split("), ")[0])


def _width(kind: str) -> int:
    return 1 if kind == "pred" else max(1, int(re.search(r"\d+", kind)[0]) // 8)


def _group(line: str) -> int:
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(match[2])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if match := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return len(match[1].split(","))
    return 2 if "source_target_pairs" in line else 0


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""
