"""Memory that a compiled module holds at once beside its arguments and results, by what it is for.

XLA tells the size of all temporaries, not what lies in them. A compiled module's instructions stand
in the order in which they run, so an array lives from the line that makes it to its last use. What
loops carry belongs to whom it was given by, updates in place make nothing, and a fusion may write
over an argument of the same size that is not needed again, as XLA's own buffer assignment has it.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from pgpo_jax.plan.hlo import Computation, Instruction, Module, Shape, branches, called, root

SAME = {"bitcast", "while", "opt-barrier", "optimization-barrier", "domain", "add-dependency"}
"""Opcodes whose result is their operand."""
IN_PLACE = {"dynamic-update-slice", "scatter", "all-reduce"}


class _Buffer(NamedTuple):
    owner: str
    index: int
    shape: Shape


_Leaves = tuple[_Buffer | None, ...]
"""The buffer of each array of a value; None for an array that belongs to the caller."""


def peak(module: Module, kind: Callable[[Shape], str]) -> dict[str, int]:
    """Bytes of one run's temporaries at the moment when they are most, by kind.

    Args:
      module: What `hlo.parse` read, of a compiled module.
      kind: What an array is for.
    """
    return _peak(module, module.entry, kind, {})


def _peak(
    module: Module, name: str, kind: Callable[[Shape], str], known: dict[str, dict[str, int]]
) -> dict[str, int]:
    if name in known:
        return known[name]
    computation = module.computations[name]
    values = _values(computation)
    last: dict[_Buffer, int] = {}
    for position, item in enumerate(computation.values()):
        for operand in (item.name, *item.operands):
            last |= {leaf: position for leaf in values.get(operand, ()) if leaf is not None}
    given = set(values[root(computation).name])  # in the caller's memory
    ends: dict[int, list[_Buffer]] = {}
    alive: Counter[str] = Counter()
    best: Counter[str] = Counter()
    for position, item in enumerate(computation.values()):
        for leaf in values[item.name]:
            if leaf is not None and leaf.owner == item.name and leaf not in given:
                alive[kind(leaf.shape)] += leaf.shape.bytes
                ends.setdefault(last[leaf], []).append(leaf)
        inner = [_peak(module, inside, kind, known) for inside in _called(item)]
        most = max(inner, key=lambda found: sum(found.values()), default={})
        if alive.total() + sum(most.values()) > best.total():
            best = alive + Counter(most)
        for leaf in ends.pop(position, []):
            alive[kind(leaf.shape)] -= leaf.shape.bytes
    known[name] = dict(best)
    return known[name]


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
    returned = _returned(computation)
    values: dict[str, _Leaves] = {}
    for position, item in enumerate(computation.values()):
        dying = [name for name in item.operands if last[name] == position]
        values[item.name] = _result(item, values, [] if item.name in returned else dying)
    return values


def _returned(computation: Computation) -> set[str]:
    """Instructions whose results the caller has given memory for."""
    found, waiting = set(), [root(computation).name]
    while waiting:
        item = computation[waiting.pop()]
        found.add(item.name)
        if item.opcode in ("tuple", "get-tuple-element", "bitcast"):
            waiting += [name for name in item.operands if name not in found]
    return found


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
