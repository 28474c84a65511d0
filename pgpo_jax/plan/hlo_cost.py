"""Cost of a compiled module: operations and bytes, loops counted as often as they run.

XLA's own cost analysis counts a loop's body once, and layers, micro-batches and vocabulary chunks
are all loops. Here the call graph is walked from the entry, a body as often as its trip count says.

What is counted, per device:

- `matrix_flops`: products (`dot`, `convolution`, known kernels), two per multiply-add;
- `flops`: those, one per element of an elementwise operation, and one per input of a reduction;
- `bytes`: operands read and results written in main memory by each kernel (a fusion is one). A
  slice of a large array counts as the slice, an update in place as the update, and what TPUs keep
  on the chip (memory space 1) not at all;
- `collective_bytes`: what a device sends when n of them work in a ring: a gather or scatter
  (n-1)/n of the whole array, an all-reduce twice that; *exposed* where nothing else runs meanwhile.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from pgpo_jax.plan.hlo import (
    MAIN_MEMORY,
    Computation,
    Instruction,
    Module,
    branches,
    called,
    root,
    trip_count,
)

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Neither compute nor move: names, containers, control, and the second half of asynchronous pairs.
FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "domain"),
    *("partition-id", "replica-id", "opt-barrier", "optimization-barrier", "add-dependency"),
    *("copy-done", "async-done", "async-update", "call-done", "send-done", "recv-done"),
    *("slice-done", "dynamic-slice-done", "dynamic-update-slice-done"),
}
# Rearrange without arithmetic.
MOVES = {
    *("copy", "copy-start", "reshape", "transpose", "broadcast", "slice", "dynamic-slice", "pad"),
    *("dynamic-update-slice", "concatenate", "gather", "iota", "reverse", "bitcast-convert"),
    *("convert", "sort", "topk", "rng-bit-generator", "slice-start", "custom-call"),
}
# Of each element by itself, so that a fusion computes what is used of the result and no more.
POINTWISE = {
    *("add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "power"),
    *("exponential", "log", "tanh", "logistic", "sqrt", "rsqrt", "compare", "select", "convert"),
    *("exponential-minus-one", "log-plus-one", "and", "or", "not", "clamp"),
}
# Products of one block of queries and keys in the kernels of splash attention.
SPLASH = {"splash_mha_fwd": 2, "splash_mha_dq": 3, "splash_mha_dkv": 4}
# Attention of cuDNN: scores and output; backward the scores again, and the gradients of the
# weights, of queries, keys and values (FlashAttention-2, arXiv 2307.08691, section 2.3).
CUDNN = "__cudnn$fmha"
CUDNN_FORWARD, CUDNN_BACKWARD = 2, 5


class Operation(NamedTuple):
    """A kernel or a collective, and how often it runs."""

    name: str
    count: int
    flops: int
    matrix_flops: int
    bytes: int
    collective: str | None
    collective_bytes: int
    attention_flops: int = 0
    """Those of `matrix_flops` that are inside a kernel of attention."""
    exposed: bool = False
    """A collective that the chip waits for."""
    group: int = 1
    """Devices that work together in the collective."""


class Cost(NamedTuple):
    """Sums over a whole run of the module, per device."""

    flops: int
    matrix_flops: int
    bytes: int
    collective_bytes: dict[str, int]
    """By kind of collective."""
    attention_flops: int


# ---- walking -------------------------------------------------------------------------------------


def total(items: Sequence[Operation]) -> Cost:
    """Sums of operations."""
    collectives: dict[str, int] = {}
    for item in items:
        if item.collective:
            sent = collectives.get(item.collective, 0)
            collectives[item.collective] = sent + item.count * item.collective_bytes
    return Cost(
        sum(item.count * item.flops for item in items),
        sum(item.count * item.matrix_flops for item in items),
        sum(item.count * item.bytes for item in items),
        collectives,
        sum(item.count * item.attention_flops for item in items),
    )


def operations(module: Module, unknown_trips: int = 1) -> list[Operation]:
    """Every kernel and collective of one run; of a conditional the dearest branch.

    Args:
      module: What `hlo.parse` read.
      unknown_trips: How often a loop runs whose end depends on data.
    """
    return list(_walk(module, module.entry, 1, unknown_trips, alone=True))


def open_loops(module: Module) -> list[Operation]:
    """Those of one pass through the loops whose end depends on data, such as one decoding step."""
    once, passed = (operations(module, trips) for trips in (0, 1))
    return [item for outside, item in zip(once, passed, strict=True) if outside.count == 0]


def _walk(
    module: Module, name: str, count: int, unknown: int, *, alone: bool
) -> Iterator[Operation]:
    """Operations of a computation; `alone` where no other one runs beside it."""
    computation = module.computations[name]
    covered = _covered(computation)
    for item in computation.values():
        if item.opcode in FREE or item.opcode.endswith("-done"):
            continue
        if item.opcode == "while":
            trips = trip_count(module, computation, item)
            times = count * (unknown if trips is None else trips)
            yield from _walk(module, called(item, "body"), times, unknown, alone=alone)
        elif item.opcode == "conditional":
            choices = [
                list(_walk(module, branch, count, unknown, alone=alone))
                for branch in branches(item)
            ]
            yield from max(choices, key=lambda items: (total(items).flops, total(items).bytes))
        elif item.opcode in ("call", "call-start", "async-start"):
            inner = called(item, "to_apply" if "to_apply=" in item.attributes else "calls")
            exposed = alone and item.name not in covered
            yield from _walk(module, inner, count, unknown, alone=exposed)
        else:
            operation = _operation(module, computation, item, count)
            yield operation._replace(
                exposed=operation.exposed and alone and item.name not in covered
            )


def _covered(computation: Computation) -> set[str]:
    """Asynchronous instructions with a kernel between their start and their end."""
    running: set[str] = set()
    covered: set[str] = set()
    for item in computation.values():
        if item.opcode.endswith("-start"):
            running.add(item.name)
        elif item.opcode.endswith("-done"):
            running -= set(item.operands)
        elif item.opcode not in FREE:
            covered |= running
    return covered


def _operation(
    module: Module, computation: Computation, item: Instruction, count: int
) -> Operation:
    kind, sent, group, started = _collective(module, computation, item)
    flops = matrix = attention = 0
    inside = [(computation, item)] if kind is None else []
    if item.opcode == "fusion":
        inside = list(_fused(module, called(item, "calls")))
    for of, instruction in inside:
        all_flops, products = _flops(of, instruction)
        flops, matrix = flops + all_flops, matrix + products
        attention += products if _attends(instruction) else 0
    return Operation(
        name=item.name,
        count=count,
        flops=flops,
        matrix_flops=matrix,
        bytes=_bytes(module, computation, item),
        collective=kind,
        collective_bytes=sent,
        attention_flops=attention,
        exposed=kind is not None and not (started and item.opcode == "fusion"),
        group=group,
    )


def _fused(module: Module, name: str) -> Iterator[tuple[Computation, Instruction]]:
    """Instructions inside a fusion and the fusions inside it."""
    computation = module.computations[name]
    for item in computation.values():
        if item.opcode == "fusion":
            yield from _fused(module, called(item, "calls"))
        else:
            yield computation, item


# ---- one instruction -----------------------------------------------------------------------------


def _flops(computation: Computation, item: Instruction) -> tuple[int, int]:
    """All operations, and those in products."""
    if item.opcode in FREE or item.opcode in COLLECTIVES:
        return 0, 0
    elements = max((shape.elements for shape in item.shapes), default=0)
    if item.opcode == "dot":
        products = 2 * elements * _contracted(computation, item)
    elif item.opcode == "convolution":
        products = _convolution(computation, item)
    elif item.opcode == "custom-call":
        products = _kernel(computation, item)
    elif item.opcode in ("reduce", "reduce-window"):
        return computation[item.operands[0]].shapes[0].elements, 0
    elif item.opcode in ("scatter", "select-and-scatter"):
        return computation[item.operands[-1]].shapes[0].elements, 0
    else:
        return (0 if item.opcode in MOVES else elements), 0
    return products, products


def _contracted(computation: Computation, item: Instruction) -> int:
    left = computation[item.operands[0]].shapes[0].dims
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", item.attributes)
    return math.prod(left[int(dim)] for dim in found[1].split(",") if dim) if found else 1


def _convolution(computation: Computation, item: Instruction) -> int:
    """TPUs write products as convolutions; an output point meets only the kernel points inside."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", item.attributes)
    assert labels is not None
    data, kernel = (computation[name].shapes[0].dims for name in item.operands[:2])
    output = item.shapes[0].dims
    window = re.search(r"window=\{([^}]*)\}", item.attributes)
    settings = dict(part.split("=") for part in window[1].split()) if window else {}
    spatial = sorted(set(labels[1]) - set("bf"))
    pairs = 1
    for axis, label in enumerate(spatial):

        def setting(name: str, default: str, axis: int = axis) -> str:
            return settings[name].split("x")[axis] if name in settings else default

        size = data[labels[1].index(label)]
        stride, dilate = int(setting("stride", "1")), int(setting("rhs_dilate", "1"))
        spread, low = int(setting("lhs_dilate", "1")), int(setting("pad", "0_0").split("_")[0])
        points = np.arange(output[labels[3].index(label)])[:, None] * stride - low
        points = points + np.arange(kernel[labels[2].index(label)])[None, :] * dilate
        inside = (points >= 0) & (points <= (size - 1) * spread) & (points % spread == 0)
        pairs *= int(inside.sum())
    batch, features = output[labels[3].index("b")], output[labels[3].index("f")]
    return 2 * batch * features * kernel[labels[2].index("i")] * pairs


def _kernel(computation: Computation, item: Instruction) -> int:
    """Products inside kernels that XLA cannot see into."""
    stated = re.search(r'"cost_estimate":\s*\{[^}]*"flops":\s*"?(\d+)', item.attributes)
    if stated:
        return int(stated[1])
    kernel = next((key for key in SPLASH if key in item.name or key in item.attributes), None)
    if kernel:
        return SPLASH[kernel] * _splash_block_products(computation, item)
    if CUDNN in item.attributes:
        return _cudnn_products(computation, item)
    if "__cublas" in item.attributes:
        left = computation[item.operands[0]].shapes[0].dims
        found = re.search(r'"lhs_contracting_dimensions":\s*(\[[^\]]*\])', item.attributes)
        inner = math.prod(left[int(dim)] for dim in json.loads(found[1])) if found else 1
        return 2 * item.shapes[0].elements * inner
    return 0


def _attends(item: Instruction) -> bool:
    """Whether an instruction is a kernel of attention."""
    known = (CUDNN, *SPLASH)
    return item.opcode == "custom-call" and any(
        key in item.name or key in item.attributes for key in known
    )


def _cudnn_products(computation: Computation, item: Instruction) -> int:
    """Operations of cuDNN's attention over the scores that its mask keeps."""
    scores = re.search(
        r'"intermediate_tensor_shape":.*?"dimensions":\s*\[([^\]]*)\]', item.attributes
    )
    mask = re.search(r'"mask_type":\s*"(\w+)"', item.attributes)
    if scores is None or mask is None:
        raise ValueError(f"custom-call {item.name} states no scores or no mask")
    *leading, queries, keys = (int(size.strip(' "')) for size in scores[1].split(","))
    kept = queries * keys
    if "CAUSAL" in mask[1]:
        stated = re.search(r'"sliding_window_length":\s*"?(\d+)', item.attributes)
        window = int(stated[1]) if stated and int(stated[1]) else keys
        kept = sum(min(i + 1, window, keys) for i in range(queries))
    width = computation[item.operands[0]].shapes[0].dims[-1]
    products = CUDNN_BACKWARD if "Backward" in item.attributes else CUDNN_FORWARD
    return products * 2 * math.prod(leading) * kept * width


def _splash_block_products(computation: Computation, item: Instruction) -> int:
    """Operations of one product over all blocks of scores that a causal mask, or a window, keeps.

    The kernel is given a table `[head, query block, kept key blocks]`; a causal row of blocks i
    keeps at most i + 1 of them.
    """
    arrays = [computation[name].shapes[0] for name in item.operands]
    table = next(array.dims for array in arrays if array.dtype in ("s8", "s32", "s16"))
    query = next(array.dims for array in arrays if array.dtype in ("bf16", "f32", "f16"))
    rows, kept = max(table[-2:]), min(table[-2:])
    blocks = sum(min(i + 1, kept) for i in range(rows))
    *leading, time, width = query
    return 2 * math.prod(leading) * blocks * (time // rows) ** 2 * width


def _bytes(module: Module, computation: Computation, item: Instruction) -> int:
    """Read and written in main memory by one kernel."""
    if item.opcode in FREE or item.opcode.endswith("-done"):
        return 0
    shapes = [computation[name] for name in item.operands if name in computation]
    if item.opcode == "custom-call" and not shapes:
        return 0  # an allocation
    if item.opcode == "fusion":
        return _fusion_bytes(module, computation, item)
    if item.opcode.endswith("-start"):
        # The result holds the operand again, and some marks.
        read = sum(operand.bytes for operand in shapes)
        if item.opcode == "copy-start":
            return read + item.shapes[0].bytes
        return max(item.bytes, read)
    if item.opcode in ("dynamic-slice", "slice", "gather"):
        return min(item.bytes, shapes[0].bytes) + item.bytes
    if item.opcode == "dynamic-update-slice":
        return 2 * shapes[1].bytes
    if item.opcode == "scatter":
        return 3 * shapes[-1].bytes
    return item.bytes + sum(operand.bytes for operand in shapes)


def _fusion_bytes(module: Module, computation: Computation, item: Instruction) -> int:
    inside = module.computations[called(item, "calls")]
    parameters = {
        int(inner.operands[0]): name
        for name, inner in inside.items()
        if inner.opcode == "parameter"
    }
    moved = 0
    for position, name in enumerate(item.operands):
        whole = computation[name].bytes
        part = _used(module, inside, parameters[position]) if whole else 0
        moved += whole if part is None else min(part, whole)
    result = root(inside)
    results = [inside[name] for name in result.operands] if result.opcode == "tuple" else [result]
    if len(results) != len(item.shapes):
        return moved + item.bytes
    for shape, result in zip(item.shapes, results, strict=True):
        update = _update(module, inside, result)
        moved += min(shape.bytes, update) if update is not None else shape.bytes
    return moved


def _used(module: Module, inside: Computation, name: str) -> int | None:
    """Bytes of a fusion's parameter that are read, where only slices of it are; else None."""
    result = root(inside)
    if name == result.name or (result.opcode == "tuple" and name in result.operands):
        return None
    read = 0
    for user in (item for item in inside.values() if name in item.operands):
        if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
            if name in user.operands[1:]:
                return None
            read += _anywhere(user)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            pass  # updated in place
        elif user.opcode in ("bitcast", "reshape", *POINTWISE):  # where its result is used only
            part = _used(module, inside, user.name)
            if part is None:
                return None
            read += part * _anywhere(inside[name]) // max(_anywhere(user), 1)
        elif user.opcode == "fusion":
            within = module.computations[called(user, "calls")]
            for position, operand in enumerate(user.operands):
                if operand != name:
                    continue
                parameter = _parameter(within, position)
                if _source(within, root(within)) == parameter:  # a bitcast, wrapped
                    part = _used(module, inside, user.name)
                else:
                    part = _used(module, within, parameter)
                if part is None:
                    return None
                read += part
        else:
            return None
    return read


def _parameter(computation: Computation, position: int) -> str:
    return next(
        name
        for name, item in computation.items()
        if item.opcode == "parameter" and item.operands[0] == str(position)
    )


def _source(computation: Computation, item: Instruction) -> str:
    """What a chain of bitcasts began with."""
    while item.opcode in ("bitcast", "reshape"):
        item = computation[item.operands[0]]
    return item.name


def _update(module: Module, inside: Computation, result: Instruction) -> int | None:
    """Bytes written where a fusion's result is an array updated in place; else None."""
    while result.opcode in ("bitcast", "copy", "reshape"):
        result = inside[result.operands[0]]
    if result.opcode == "fusion":
        within = module.computations[called(result, "calls")]
        return _update(module, within, root(within))
    if result.opcode != "dynamic-update-slice":
        return None
    return _anywhere(inside[result.operands[1]])


def _anywhere(item: Instruction) -> int:
    """Bytes of a value inside a fusion, whose layout says nothing of where it is."""
    return sum(shape._replace(space=MAIN_MEMORY).bytes for shape in item.shapes)


# ---- collectives ---------------------------------------------------------------------------------


class _Sent(NamedTuple):
    """A collective's kind (None: no collective) and the bytes that one device of a group sends."""

    kind: str | None
    bytes: int = 0
    group: int = 1
    started: bool = False
    """Only begun: its end is another instruction."""


def _collective(module: Module, computation: Computation, item: Instruction) -> _Sent:
    if item.opcode == "fusion":  # TPUs wrap collectives, with or without other work
        name = called(item, "calls")
        inside = [
            (inner, of)
            for of, inner in _fused(module, name)
            if inner.opcode.removesuffix("-start") in COLLECTIVES
        ]
        if not inside:
            return _Sent(None)
        inner, of = inside[0]
        found = _collective(module, of, inner)
        if found.kind == "all-reduce" and ("reduce-scatter" in name or "reduce_scatter" in name):
            # Every device keeps only its part.
            return found._replace(kind="reduce-scatter", bytes=found.bytes // 2)
        return found
    kind = item.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return _Sent(None)
    operands = sum(_anywhere(computation[name]) for name in item.operands)
    size = group_size(item.attributes)
    part = (size - 1) / size
    sent = {
        "all-gather": operands * (size - 1),
        "all-reduce": 2 * operands * part,
        "reduce-scatter": operands * part,
        "all-to-all": operands * part,
        "ragged-all-to-all": operands * part,
    }.get(kind, operands)
    return _Sent(kind, round(sent), size, kind != item.opcode)


def group_size(attributes: str) -> int:
    """Devices that work together in a collective, from its `replica_groups`."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes)
    if mesh:
        axes = dict(re.findall(r"'([^']+)'=(\d+)", mesh[1]))
        named = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or axes[name]) for name, part in named)
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=", attributes)
    if tiled:
        return int(tiled[1].split(",")[-1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    if listed:
        return len(listed[1].split(","))
    pairs = re.search(r"source_target_pairs=\{\{(.*?)\}\}", attributes)
    if pairs:
        return len(set(itertools.chain(*(pair.split(",") for pair in pairs[1].split("},{")))))
    return 1
