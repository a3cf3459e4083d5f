"""Work counted from the text of a compiled program (optimised HLO): what one device computes, moves and sends.

`compiled.cost_analysis()` counts the body of a loop once. Here a body counts as often as it runs: known trip counts are read from
the program; those that the data decides come from the caller, by the `jax.named_scope` around the loop.

* FLOPs are those of matrix products (`dot`, and `convolution`, into which TPUs turn it), by the convention of MFU.
  Attention kernels count with all pairs of queries and keys, including those that a causal mask hides.
* Bytes are those that an instruction reads and writes in the device's main memory: operands and results of everything
  outside a fusion; of an operand that is only sliced, the slices (also in fusions inside the fusion); of an array that is
  updated in place, the update. Buffers in on-chip memory are free.
* Collectives count the bytes that a device sends by the ring algorithm: (n - 1) / n of the whole array in a group of n, and
  twice that for an all-reduce. In a group that spans nodes of k devices each, 1 / k of them go to another node.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

BITS = {"pred": 8, "token": 0, "opaque": 0, "f8e4m3": 8, "f8e5m2": 8, "bf16": 16, "f32": 32, "c64": 64, "c128": 128}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all")
FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier "
    "add-dependency domain while conditional call".split()
)
KERNEL = re.compile(r"splash_m[hq]a_(fwd|dq|dkv)")
PRODUCTS = {"fwd": 2, "dq": 3, "dkv": 4}  # of two matrices of an attention kernel
TRITON = "__gpu$xla.gpu.triton"  # the custom call of a Pallas kernel on a GPU
TRITON_PRODUCTS = {"mha_forward": 2, "mha_preprocess_backward": 0, "mha_backward": 3 + 4}
SHAPE = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")


class HLOError(ValueError):
    """A program that cannot be counted; the message names the instruction."""


class Array(NamedTuple):
    """An array of a program."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool  # in another memory than the main one

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> float:
        """Bytes of main memory; 0 for an array on the chip."""
        if self.on_chip:
            return 0.0
        digits = re.search(r"\d+", self.dtype)
        return self.size * BITS.get(self.dtype, int(digits[0]) if digits else 0) / 8


@dataclasses.dataclass(frozen=True, eq=False)
class Instruction:
    """A line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of the result, a tuple's flattened
    operands: tuple[str, ...]
    arguments: str  # between the parentheses, as written
    attributes: str
    root: bool

    @property
    def scopes(self) -> list[str]:
        """The names in a loop's path, .../outer/scope/while (or cond); the last is the `jax.named_scope` right around it."""
        match = re.search(r'op_name="([^"]*)/(?:while|cond)\)*"', self.attributes)
        return re.findall(r"\w+", match[1]) if match else []

    @property
    def op_name(self) -> str:
        """The instruction's path in the JAX program, or its own name."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else self.name

    def called(self, *attributes: str) -> list[str]:
        """The names of the computations in these attributes, in order."""
        names = []
        for attribute in attributes:
            if match := re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes):
                names += re.findall(r"%?([\w.\-]+)", match[1])
        return names


Computation = dict[str, Instruction]


@dataclasses.dataclass
class Count:
    """The work of one device: FLOPs, bytes of main memory, and the bytes sent and number of calls by kind of collective."""

    flops: float = 0.0
    bytes: float = 0.0
    sent: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    calls: dict[str, float] = dataclasses.field(default_factory=lambda: collections.defaultdict(float))
    between_nodes: float = 0.0  # of the bytes sent, those that go to another node

    def add(self, other: "Count", times: float = 1.0) -> None:
        """Adds other work, done so many times."""
        self.flops += times * other.flops
        self.bytes += times * other.bytes
        self.between_nodes += times * other.between_nodes
        for mine, others in ((self.sent, other.sent), (self.calls, other.calls)):
            for kind, x in others.items():
                mine[kind] += times * x


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of its entry.

    Raises:
        HLOError: the text is no HLO module, or an instruction cannot be read.
    """
    computations: dict[str, Computation] = {}
    current, entry = None, None
    # A kernel's own metadata spans several lines, which begin with a quote or close more than one bracket.
    for line in re.sub(r'\n(?="|\}\})', " ", text).splitlines():
        if header := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line)):
            for operand in instruction.operands:
                if "#" in operand:
                    current[operand] = _element(current, operand)
            current[instruction.name] = instruction
    if entry is None:
        raise HLOError("this is no HLO module: it has no entry")
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    start = re.match(r"\s*(ROOT )?%?([\w.\-]+) = ", line)
    if not start:
        return None
    at = start.end()
    end = _closing(line, at) if line[at] == "(" else line.index(" ", at)
    result = line[at:end]
    opcode = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not opcode:
        raise HLOError(f"unreadable instruction {line.strip()[:200]!r}")
    close = _closing(line, opcode.end() - 1)
    arguments = line[opcode.end() : close - 1]
    return Instruction(
        name=start[2],
        opcode=opcode[1],
        arrays=tuple(_array(*match.groups()) for match in SHAPE.finditer(result)),
        operands=tuple(re.findall(r"%([\w.\-]+(?:#\d+)?)", arguments)),
        arguments=arguments,
        attributes=line[close:],
        root=bool(start[1]),
    )


def _element(computation: Computation, operand: str) -> Instruction:
    """The instruction behind an operand of newer compilers: they write `%x#2` for `get-tuple-element(%x), index=2`."""
    name, index = operand.split("#")
    array = computation[name].arrays[int(index)]
    return Instruction(operand, "get-tuple-element", (array,), (name,), f"%{name}", f", index={index}", root=False)


def _closing(line: str, at: int) -> int:
    """The index after the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if depth == 0:
            return i + 1
    raise HLOError(f"unbalanced parentheses in {line.strip()[:200]!r}")


def _array(dtype: str, shape: str, layout: str | None) -> Array:
    space = re.search(r"S\((\d+)\)", layout or "")
    dims = tuple(int(x) for x in shape.split(",") if x)
    return Array(dtype, dims, space is not None and space[1] != "0")


class WorkCounter:
    """A counter of the work of a program."""

    def __init__(
        self,
        text: str,
        turns: Mapping[str, float] = {},  # noqa: B006, never changed
        nodes: Sequence[int] | None = None,
    ):
        """Parses a program.

        Args:
            text: optimised HLO.
            turns: scope -> how often a loop's body runs, or the share of times that a branch is taken.
            nodes: the node of each device of the program, in its order. None: all are neighbours.
        """
        self.computations, self.entry = parse(text)
        self.turns = dict(turns)
        self.nodes = None if nodes is None else np.asarray(nodes)
        self.assumed: set[str] = set()  # scopes of `turns` that were needed
        self.known: dict[str, Count] = {}

    def total(self) -> Count:
        """Counts the work of one run of the program."""
        return self.computation(self.entry)

    def computation(self, name: str) -> Count:
        """Counts the work of one run of a computation."""
        if name not in self.known:
            self.known[name] = count = Count()
            for instruction in self.computations[name].values():
                count.add(self.instruction(instruction, self.computations[name]))
        return self.known[name]

    def instruction(self, x: Instruction, within: Computation) -> Count:
        """Counts the work of one run of an instruction of the computation `within`."""
        count = Count()
        kind = x.opcode.removesuffix("-start")
        if x.opcode == "while":
            body, condition = x.called("body"), x.called("condition")
            for name in (*body, *condition):
                count.add(self.computation(name), self.trips(x, condition[0], body[0]))
        elif x.opcode == "conditional":
            self.branches(x, count)
        elif x.opcode in ("call", "async-start"):
            for name in x.called("to_apply", "calls"):
                count.add(self.computation(name))
        elif x.opcode == "fusion":
            for name in x.called("calls"):
                inside = self.computation(name)
                scatters = "all-reduce-scatter" in x.name  # on TPUs: an all-reduce of which a device keeps one shard
                for collective, sent in inside.sent.items():
                    as_kind = "reduce-scatter" if scatters and collective == "all-reduce" else collective
                    count.sent[as_kind] += sent / (2 if as_kind != collective else 1)
                    count.calls[as_kind] += inside.calls[collective]
                count.flops += inside.flops
                count.between_nodes += inside.between_nodes
                count.bytes += self.fusion_bytes(x, self.computations[name], within)
        elif kind in COLLECTIVES:
            moved = sum(array.bytes for name in x.operands for array in within[name].arrays)
            size = sum(_stored(array) for name in x.operands for array in within[name].arrays)
            groups = _groups(x)
            sent = size * _share_sent(kind, groups.shape[1])
            count.sent[kind] += sent
            count.calls[kind] += 1
            if self.nodes is not None:
                count.between_nodes += sent * _share_between(kind, self.nodes[groups])
            count.bytes += 2 * moved if kind != "all-gather" else moved + _result_bytes(x)
        elif x.opcode.endswith("-done") or x.opcode in FREE:
            pass
        elif x.opcode == "custom-call" and (kernel := KERNEL.match(x.name)):
            self.attention_kernel(x, kernel[1], within, count)
        elif x.opcode == "custom-call" and f'"{TRITON}"' in x.attributes:
            count.flops += _triton_kernel(x, within)
            count.bytes += self.plain_bytes(x, within)  # what tiles read again, the cache of the second level holds
        else:
            count.flops += self.product(x, within)
            count.bytes += self.plain_bytes(x, within)
        return count

    def attention_kernel(self, x: Instruction, kind: str, within: Computation, count: Count) -> None:
        """Adds the work of splash attention, which reads both arrays of the outer axis again for each tile of the inner one."""
        arrays = [array for name in x.operands for array in within[name].arrays]
        blocks = arrays[0].shape  # [.., of queries, of keys]
        q, k = [array for array in arrays if not array.dtype.startswith("s")][
            :2
        ]  # [.., heads, T, D], [.., kv_heads, S, D]
        *batch, heads, length, dim = q.shape
        batch, keys = math.prod(batch), k.shape[-2]
        count.flops += 2.0 * PRODUCTS[kind] * batch * heads * length * keys * dim
        streamed, turns = (length, blocks[-1]) if kind == "dkv" else (keys, blocks[-2])
        again = 2 * batch * heads * (turns - 1) * streamed * dim * BITS[q.dtype] / 8
        count.bytes += self.plain_bytes(x, within) + again

    def trips(self, x: Instruction, condition: str, body: str) -> float:
        """The number of times that the body of a loop runs.

        Raises:
            HLOError: neither the program nor `turns` says it.
        """
        if match := re.search(r'"known_trip_count":\s*\{"n":\s*"(\d+)"', x.attributes):
            return int(match[1])
        if scope := self.scope(x):
            return self.turns[scope]
        if (counted := self._counted(self.computations[condition], self.computations[body])) is not None:
            return counted
        raise HLOError(f"how often the loop {x.op_name} runs is not known, nor is its scope given")

    def scope(self, x: Instruction) -> str | None:
        """The scope of `turns` around a loop or branch: "inner", or "outer/inner", which is looked for first."""
        scopes = x.scopes
        fitting = [scope for scope in self.turns if scopes[-len(parts := scope.split("/")) :] == parts]
        if not fitting:
            return None
        found = max(fitting, key=len)
        self.assumed.add(found)
        return found

    @staticmethod
    def _counted(condition: Computation, body: Computation) -> int | None:
        """Turns of a loop whose condition is just `counter < constant` and whose body adds a constant to that counter.

        Counters start at zero, in scans and in the products that XLA cuts into windows between the devices. None: another loop.
        """
        compare, result = _root(condition), _root(body)
        if compare.opcode != "compare" or "direction=LT" not in compare.attributes or result.opcode != "tuple":
            return None
        counter, limit = (condition[name] for name in compare.operands)
        if counter.opcode != "get-tuple-element" or limit.opcode != "constant":
            return None
        index = re.search(r"index=(\d+)", counter.attributes)
        assert index is not None  # every get-tuple-element has one
        added = body[result.operands[int(index[1])]]
        while added.opcode in PASSING:
            added = body[added.operands[0]]
        step = [y for name in added.operands if (y := body[name]).opcode == "constant"]
        if added.opcode != "add" or not step:
            return None
        return -(-int(limit.arguments) // int(step[0].arguments))

    def branches(self, x: Instruction, count: Count) -> None:
        """Adds the work of branches: in a known scope by their shares, in others that of the branch with the most work."""
        names = x.called("branch_computations", "true_computation", "false_computation")
        if scope := self.scope(x):
            for name in names:
                inside = " ".join(i.attributes for i in self.computations[name].values())
                taken = re.search(rf"{scope}\)*/(?:cond/)?branch_1_fun", inside)
                count.add(self.computation(name), self.turns[scope] if taken else 1 - self.turns[scope])
            return
        count.add(max(map(self.computation, names), key=lambda c: (c.flops, c.bytes)))

    def product(self, x: Instruction, within: Computation) -> float:
        """The FLOPs of a matrix product; 0 for any other instruction."""
        if x.opcode == "dot":
            lhs = within[x.operands[0]].arrays[0].shape
            contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", x.attributes)
            dims = [int(d) for d in contracted[1].split(",") if d] if contracted else []
            return 2.0 * x.arrays[0].size * math.prod(lhs[d] for d in dims)
        if x.opcode == "convolution":
            return _convolution(x, *(within[name].arrays[0].shape for name in x.operands[:2]))
        return 0.0

    def plain_bytes(self, x: Instruction, within: Computation) -> float:
        """Bytes read and written by an instruction outside fusions."""
        if x.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _result_bytes(x)
        if x.opcode == "dynamic-update-slice":
            return 2 * within[x.operands[1]].arrays[0].bytes
        if x.opcode == "scatter":
            return 2 * within[x.operands[-1]].arrays[0].bytes
        if x.opcode == "copy-start":  # (destination, source, context)
            return sum(array.bytes for array in x.arrays[:2])
        return _result_bytes(x) + sum(a.bytes for name in x.operands if name in within for a in within[name].arrays)

    def fusion_bytes(self, x: Instruction, inside: Computation, within: Computation) -> float:
        """As `plain_bytes`: operands that are only sliced count as their slices, a result updated in place as the update."""
        read = 0.0
        for parameter in (i for i in inside.values() if i.opcode == "parameter"):
            operand = within[x.operands[int(parameter.arguments)]]
            if not any(array.bytes for array in operand.arrays):
                continue
            uses = list(self.uses(parameter, inside))
            if uses and all(index == 0 and user.opcode in SLICING for index, user in uses):
                slices = [user for _, user in uses if user.opcode not in UPDATING]
                read += sum(_stored(array) for user in slices for array in user.arrays)
            else:
                read += sum(array.bytes for array in operand.arrays)
        root = _root(inside)
        written = 0.0
        parts = [inside[name] for name in root.operands] if root.opcode == "tuple" else [root]
        for array, part in zip(x.arrays, parts, strict=False):
            update = None if array.on_chip else self.update(part, inside)
            written += array.bytes if update is None else update
        return read + written

    def uses(self, x: Instruction, within: Computation) -> Iterator[tuple[int, Instruction]]:
        """The instructions that read `x`, with the operand's index: through bitcasts, copies and fusions inside fusions."""
        for user in within.values():
            for index in (i for i, name in enumerate(user.operands) if name == x.name):
                if user.opcode in PASSING:
                    yield from self.passed(user, within)
                elif user.opcode == "fusion":
                    inner = self.computations[user.called("calls")[0]]
                    (parameter,) = [i for i in inner.values() if i.opcode == "parameter" and int(i.arguments) == index]
                    for deeper, reader in self.uses(parameter, inner):
                        if reader.root and reader.opcode in PASSING:
                            yield from self.passed(user, within)
                        else:
                            yield deeper, reader
                else:
                    yield index, user

    def passed(self, x: Instruction, within: Computation) -> Iterator[tuple[int, Instruction]]:
        """The instructions that read the result of a bitcast or copy; the bitcast or copy itself where it is the root."""
        yield from [(0, x)] if x.root else self.uses(x, within)

    def update(self, x: Instruction, within: Computation) -> float | None:
        """The bytes that are written into an array updated in place; None for any other result."""
        while x.opcode in (*PASSING, "convert") and x.operands[0] in within:
            x = within[x.operands[0]]
        if x.opcode == "fusion":
            inner = self.computations[x.called("calls")[0]]
            return self.update(_root(inner), inner)
        return _stored(within[x.operands[UPDATING[x.opcode]]].arrays[0]) if x.opcode in UPDATING else None


UPDATING = {"dynamic-update-slice": 1, "scatter": -1}  # which operand is written into the first
SLICING = ("dynamic-slice", "slice", "gather", *UPDATING)
PASSING = ("bitcast", "copy")


def _root(computation: Computation) -> Instruction:
    return next(x for x in computation.values() if x.root)


def _stored(array: Array) -> float:
    """The bytes of an array in any memory."""
    return array._replace(on_chip=False).bytes


def _result_bytes(x: Instruction) -> float:
    return sum(array.bytes for array in x.arrays)


def _triton_kernel(x: Instruction, within: Computation) -> float:
    """FLOPs of an attention kernel on a GPU, of q and k [B, T, heads, D] and [B, S, heads, D].

    Raises:
        HLOError: it is another kernel.
    """
    names = [name for name in TRITON_PRODUCTS if re.search(rf"\b{name}\b", x.op_name)]
    if not names:
        raise HLOError(f"the work of the kernel {x.op_name} is not known; there are {', '.join(TRITON_PRODUCTS)}")
    q, k = (within[name].arrays[0].shape for name in x.operands[:2])
    if not TRITON_PRODUCTS[names[0]]:
        return 0.0
    batch, length, heads, dim = q
    return 2.0 * TRITON_PRODUCTS[names[0]] * batch * heads * length * k[1] * dim


def _groups(x: Instruction) -> np.ndarray:
    """The devices of each group of a collective, int [groups, devices of a group]; of a permutation the pairs."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", x.attributes):
        return _mesh_groups(match[1], match[2])
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", x.attributes):
        dims = [int(d) for d in match[3].split(",")]
        devices = np.arange(math.prod(dims)).reshape(dims)
        order = [int(d) for d in match[4].split(",")] if match[4] else None
        return devices.transpose(order).reshape(int(match[1]), int(match[2]))
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{}]*\})\}", x.attributes):
        return np.array([[int(d) for d in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])])
    raise HLOError(f"the collective {x.name} does not say between whom: {x.attributes[:200]}")


def _mesh_groups(sizes: str, along: str) -> np.ndarray:
    """Groups along some axes of a mesh, as in `'data'=2,'tensor'=4` and `'tensor'`, or of a factor, `'tensor':(2)2`."""
    shape: list[int] = []
    inside: list[int] = []  # dimensions of the groups
    factors = {axis: (before, size) for axis, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", along)}
    for axis, size in re.findall(r"'([^']*)'=(\d+)", sizes):
        before, part = factors.get(axis, ("1", "1"))
        before, part = (int(before), int(part)) if part else (1, int(size))
        inside += [len(shape) + 1] * (axis in factors)
        shape += [before, part, int(size) // before // part]
    devices = np.arange(math.prod(shape)).reshape(shape)
    outside = [i for i in range(len(shape)) if i not in inside]
    return devices.transpose(outside + inside).reshape(-1, math.prod(shape[i] for i in inside))


def _share_sent(kind: str, n: int) -> float:
    """The number of bytes that a device sends for each byte that it has before the collective."""
    if kind == "collective-permute":
        return 1.0
    return {"all-gather": n - 1.0, "all-reduce": 2 * (n - 1) / n}.get(kind, (n - 1) / n)


def _share_between(kind: str, nodes: np.ndarray) -> float:
    """The share of a device's sent bytes that go to another node.

    A library of collectives runs as many rings as a node has devices in the group, and each ring leaves the node at another one.

    Args:
        kind: of collective.
        nodes: int [groups, n], the node of each device of each group.
    """
    if kind == "collective-permute":
        return float(np.mean(nodes[:, 0] != nodes[:, 1]))
    n, together = nodes.shape[1], nodes.shape[1] / len(np.unique(nodes[0]))
    if together == n:
        return 0.0
    return (n - together) / (n - 1) if "all-to-all" in kind else 1 / together


def _convolution(x: Instruction, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> float:
    """FLOPs of a convolution: 2 for every pair of an input and a kernel element that exist.

    TPUs write batches as dilated space, most of which is no element.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes)
    if labels is None:
        raise HLOError(f"the convolution {x.name} does not name its dimensions: {x.attributes[:200]}")
    out = x.arrays[0].shape
    windows = re.search(r"window=\{([^}]*)\}", x.attributes)
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", windows[1] if windows else ""))
    spatial = sorted(c for c in labels[1] if c.isdigit())

    def at(dims: str, label: str, shape: tuple[int, ...]) -> int:
        return shape[dims.index(label)]

    def of(key: str, i: int, default: int) -> int:
        return int(window[key].split("x")[i]) if key in window else default

    pairs = 1
    for i, label in enumerate(spatial):
        low = int(window["pad"].split("x")[i].split("_")[0]) if "pad" in window else 0
        pairs *= _taps(
            at(labels[1], label, lhs),
            at(labels[2], label, rhs),
            at(labels[3], label, out),
            of("stride", i, 1),
            low,
            of("lhs_dilate", i, 1),
            of("rhs_dilate", i, 1),
        )
    groups = re.search(r"batch_group_count=(\d+)", x.attributes)
    batch = at(labels[3], "b", out) if not groups else at(labels[1], "b", lhs) // int(groups[1])
    return 2.0 * pairs * batch * at(labels[3], "f", out) * at(labels[2], "i", rhs)


@functools.cache
def _taps(size: int, kernel: int, out: int, stride: int, low: int, dilate: int, kernel_dilate: int) -> int:
    """Pairs of an output and a kernel position of one spatial dimension that meet an input element.

    A mirrored kernel meets as many.
    """
    start = np.arange(out, dtype=np.int64) * stride - low
    met = 0
    for k in range(kernel):
        at = start + k * kernel_dilate
        met += int(np.sum((at >= 0) & (at <= (size - 1) * dilate) & (at % dilate == 0)))
    return met
