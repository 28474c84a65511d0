"""Memory that a compiled module holds at once beside its arguments and results, by what it is for.

XLA tells the size of all temporaries, not what lies in them. A compiled module's instructions stand
in the order in which they run, so an array lives from the line that makes it to its last use. What
loops carry belongs to whom it was given by, updates in place make nothing, and a fusion may write
over an argument of the same size that is not needed again, as XLA's own buffer assignment has it.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

from pgpo_jax.plan.hlo import Computation, Instruction, Module, Shape, branches, called, root

SAME = {"bitcast", "while", "opt-barrier", "optimization-barrier", "domain", "add-dependency"}
"""Opcodes whose result is their operand."""
IN_PLACE = {"dynamic-update-slice", "scatter", "all-reduce"}


class Live(NamedTuple):
    """Bytes alive at the moment when most are, and those of them that a mark was set on."""

    total: int
    marked: int


class _Buffer(NamedTuple):
    owner: str
    index: int
    shape: Shape


_Leaves = tuple[_Buffer | None, ...]
"""The buffer of each array of a value; None for an array that belongs to the caller."""


def peak(module: Module, mark: Callable[[Shape], bool]) -> Live:
    """Temporaries of one run at their largest.

    Args:
      module: What `hlo.parse` read, of a compiled module.
      mark: Whether an array is one of those to tell apart.
    """
    return _peak(module, module.entry, mark, {})


def _peak(module: Module, name: str, mark: Callable[[Shape], bool], known: dict[str, Live]) -> Live:
    if name in known:
        return known[name]
    computation = module.computations[name]
    values = _values(computation)
    last: dict[_Buffer, int] = {}
    for position, item in enumerate(computation.values()):
        for operand in (item.name, *item.operands):
            last |= {leaf: position for leaf in values.get(operand, ()) if leaf is not None}
    given = set(values[root(computation).name])  # in the caller's memory
    changes = [[0, 0] for _ in range(len(computation) + 1)]
    for position, item in enumerate(computation.values()):
        for leaf in values[item.name]:
            if leaf is None or leaf.owner != item.name or leaf in given:
                continue
            size = leaf.shape.bytes
            for where, sign in ((position, 1), (last[leaf] + 1, -1)):
                changes[where][0] += sign * size
                changes[where][1] += sign * size * mark(leaf.shape)
    best = Live(0, 0)
    alive = itertools.accumulate(changes, lambda a, b: [a[0] + b[0], a[1] + b[1]])
    for item, (total, marked) in zip(computation.values(), alive, strict=False):
        inner = [_peak(module, inside, mark, known) for inside in _called(item)]
        most = max(inner, default=Live(0, 0))
        best = max(best, Live(total + most.total, marked + most.marked))
    known[name] = best
    return best


def _called(item: Instruction) -> list[str]:
    """Computations whose instructions are kernels of their own."""
    if item.opcode == "while":
        return [called(item, "body")]
    if item.opcode == "conditional":
        return branches(item)
    if item.opcode in ("call", "call-start", "async-start"):
        return [called(item, "to_apply" if "to_apply=" in item.attributes else "calls")]
    return []


def _values(computation: Computation) -> dict[str, _Leaves]:
    """The buffers of every instruction's result."""
    last = {
        operand: position
        for position, item in enumerate(computation.values())
        for operand in item.operands
    }
    values: dict[str, _Leaves] = {}
    for position, item in enumerate(computation.values()):
        dying = [name for name in item.operands if last[name] == position]
        values[item.name] = _result(item, values, dying)
    return values


def _result(item: Instruction, values: dict[str, _Leaves], dying: list[str]) -> _Leaves:
    operands = [values.get(name, ()) for name in item.operands]
    fresh = tuple(_Buffer(item.name, i, shape) for i, shape in enumerate(item.shapes))
    if item.opcode in ("parameter", "constant"):
        return (None,) * len(fresh)
    if item.opcode == "tuple":
        return tuple(itertools.chain(*operands))
    if item.opcode == "get-tuple-element":
        index = int(item.attributes.split("index=")[1].split(",")[0])
        return operands[0][index : index + 1] if len(fresh) == 1 else fresh
    if item.opcode in SAME or item.opcode.endswith("-done"):
        leaves = tuple(operands[0]) if operands else ()
        return leaves if len(leaves) == len(fresh) else leaves[-len(fresh) :]
    if item.opcode in IN_PLACE and len(operands[0]) == len(fresh):
        return operands[0]
    if item.opcode != "fusion":
        return fresh
    reusable = [leaf for name in dying for leaf in values.get(name, ())]
    result: list[_Buffer | None] = []
    for buffer in fresh:
        same = next((x for x in reusable if x and x.shape.bytes == buffer.shape.bytes), buffer)
        reusable = [leaf for leaf in reusable if leaf != same]
        result.append(same)
    return tuple(result)
