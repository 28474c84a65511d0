"""HLO text of a compiled module, parsed: computations, instructions, how often loops run.

`hlo_cost` counts with it. XLA's classes show no attribute of an instruction to Python, so the text,
which has been stable for years, is what there is to read.
"""

import functools
import math
import re
from typing import NamedTuple

MAIN_MEMORY = 0  # TPUs number the memory on the chip 1


class Shape(NamedTuple):
    """An array of a possibly nested result."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """In main memory; 0 for an array elsewhere."""
        if self.space != MAIN_MEMORY:
            return 0
        return -(-self.elements * _bits(self.dtype) // 8)


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """All computations by name."""

    computations: dict[str, Computation]
    entry: str


# ---- reading -------------------------------------------------------------------------------------


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives."""
    computations: dict[str, Computation] = {}
    entry = ""
    current: Computation | None = None
    pending = ""

    def close():
        if pending and current is not None:
            instruction = _instruction(pending)
            current[instruction.name] = instruction

    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header and not line.startswith(" "):
            name = header[2]
            current, pending = computations.setdefault(name, {}), ""
            entry = name if header[1] else entry
        elif line.startswith("}") and not line.startswith("}}"):
            close()
            current, pending = None, ""
        elif current is not None and re.match(r"\s+(ROOT )?%?[\w.\-]+ = ", line):
            close()
            pending = line
        else:  # an attribute with line breaks in it
            pending = pending and pending + " " + line
    if not entry:
        raise ValueError("no ENTRY computation in the module's text")
    return Module(computations, entry)


def _instruction(line: str) -> Instruction:
    head, rest = line.strip().split(" = ", 1)
    name = head.removeprefix("ROOT ").lstrip("%")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = _shapes(rest[:end]), rest[end:].lstrip()
    opened = rest.index("(")
    closed = _closing(rest, opened)
    operands = tuple(
        part.split()[-1].lstrip("%") for part in _split(rest[opened + 1 : closed]) if part.strip()
    )
    return Instruction(
        name, rest[:opened], shapes, operands, rest[closed + 1 :], head.startswith("ROOT ")
    )


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"unbalanced brackets: {text[:200]}")


def _split(text: str) -> list[str]:
    """At the commas outside brackets, without `/*index=5*/`."""
    text = re.sub(r"/\*.*?\*/", "", text)
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


@functools.cache
def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.findall(r"([a-z]\w*)\[([^\]]*)\](?:\{([^{}]*)\})?", text)
    shapes = []
    for dtype, dims, layout in found:
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        shapes.append(Shape(dtype, sizes, int(space[1]) if space else MAIN_MEMORY))
    return tuple(shapes)


def _bits(dtype: str) -> int:
    """Of one element: bf16, f8e4m3fn, s4, pred; a token has none."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8 * (dtype == "pred")


def called(item: Instruction, attribute: str) -> str:
    """Name of the computation that an attribute such as `body` points to."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", item.attributes)
    if found is None:
        raise ValueError(f"{item.opcode} {item.name} names no {attribute}")
    return found[1]


def branches(item: Instruction) -> list[str]:
    """Names of the computations of a conditional."""
    attributes = item.attributes
    listed = re.search(r"branch_computations=\{([^}]*)\}", attributes)
    if listed:
        return [name.strip().lstrip("%") for name in listed[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", attributes)


# ---- trip counts ---------------------------------------------------------------------------------


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """How often a `while` runs; None where that depends on data.

    XLA notes it for some backends. Else the loop must count from a constant to a constant in
    constant steps, as `scan` and `fori_loop` do.
    """
    noted = re.search(r'known_trip_count\\?":\s*\{\\?"n\\?":\s*\\?"(\d+)', loop.attributes)
    if noted:
        return int(noted[1])
    condition = module.computations[called(loop, "condition")]
    body = module.computations[called(loop, "body")]
    test = root(condition)
    if test.opcode == "fusion":  # the comparison alone, wrapped
        inside = module.computations[called(test, "calls")]
        test = root(inside)._replace(
            operands=tuple(_outer(inside, test, name) for name in root(inside).operands)
        )
    direction = re.search(r"direction=(\w+)", test.attributes)
    if test.opcode != "compare" or direction is None:
        return None
    left, right = (_source(condition, name) for name in test.operands)
    flipped = {"GT": "LT", "GE": "LE", "LT": "GT", "LE": "GE"}
    order = direction[1]
    if not isinstance(left, _Slot):
        left, right, order = right, left, flipped.get(order, order)
    if not isinstance(left, _Slot) or order not in ("LT", "LE"):
        return None
    start, bound = (_before(computation, loop, value) for value in (left, right))
    step = _step(body, left.index)
    if start is None or bound is None or not step:
        return None
    span = bound - start + (order == "LE")
    return max(-(-span // step), 0)


class _Slot(NamedTuple):
    """An element of a loop's state."""

    index: int


def root(computation: Computation) -> Instruction:
    """The instruction whose value is the computation's."""
    return next(item for item in computation.values() if item.root)


def _outer(inside: Computation, fusion: Instruction, name: str) -> str:
    """The fusion's operand that a parameter stands for; other names as they are."""
    item = inside[name]
    return fusion.operands[int(item.operands[0])] if item.opcode == "parameter" else name


def _source(computation: Computation, name: str) -> "_Slot | int | None":
    """A constant, or the element of the loop's state that a scalar is."""
    item = computation.get(name)
    while item is not None and item.opcode in ("copy", "bitcast", "reshape", "convert"):
        item = computation.get(item.operands[0])
    if item is None:
        return None
    if item.opcode == "constant":
        return int(item.operands[0]) if re.fullmatch(r"-?\d+", item.operands[0]) else None
    if item.opcode == "get-tuple-element":
        origin = computation[item.operands[0]]
        if origin.opcode == "parameter":
            return _Slot(_index(item))
    return None


def _index(item: Instruction) -> int:
    found = re.search(r"index=(\d+)", item.attributes)
    return int(found[1]) if found else -1


def _before(computation: Computation, loop: Instruction, value: "_Slot | int | None") -> int | None:
    """What a value is when the loop begins."""
    if not isinstance(value, _Slot):
        return value
    state = computation[loop.operands[0]]
    if state.opcode != "tuple":
        return None
    found = _source(computation, state.operands[value.index])
    return found if isinstance(found, int) else None


def _step(body: Computation, index: int) -> int | None:
    """By how much the body raises an element of the state."""
    result = root(body)
    if result.opcode != "tuple":
        return None
    item = body[result.operands[index]]
    while item.opcode in ("copy", "bitcast"):
        item = body[item.operands[0]]
    if item.opcode != "add":
        return None
    parts = [_source(body, name) for name in item.operands]
    steps = [part for part in parts if isinstance(part, int)]
    return steps[0] if len(steps) == 1 and _Slot(index) in parts else None
