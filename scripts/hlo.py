"""Memory traffic, kernels, collectives and control flow of a compiled XLA program, read from its text.

Why: without a device nothing can be timed, but the optimised program already shows which bytes cross
the memory bus, how many kernels are launched and which messages are sent. This is deterministic, so a
test can check it, which is not true of times.

Only scheduled instructions count: those of the entry computation and those of loop bodies, times their
trip count. Instructions inside a fusion use registers or on-chip memory. Sizes are of the logical arrays;
the padding that a TPU adds to fill its tiles (rows of 64 become 128) is not counted.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable

BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "token": 0, "opaque": 0}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = frozenset(
  "parameter tuple get-tuple-element bitcast constant after-all partition-id replica-id opt-barrier "
  "add-dependency domain".split()
)
_SLICING = frozenset(("dynamic-slice", "slice", "gather"))
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_CALLED = re.compile(
  r"(?:calls|to_apply|true_computation|false_computation|branch_computations)="
  r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Array:
  """One array of an instruction's result."""

  bytes: int
  space: int  # memory space: 0 is the device's main memory, others are on the chip


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of the program."""

  name: str
  op: str
  arrays: tuple[Array, ...]  # of the result, in order
  operands: tuple[str, ...]
  called: tuple[str, ...]  # names of computations
  line: str


def _arrays(text: str) -> tuple[Array, ...]:
  out = []
  for kind, dims, layout in _ARRAY.findall(text):
    width = BYTES.get(kind) or int(re.sub(r"\D", "", kind.split("e")[0]) or 0) / 8
    size = math.prod(int(d.lstrip("<=")) for d in dims.split(",") if d)
    space = re.search(r"S\((\d+)\)", layout)
    out.append(Array(math.ceil(size * width), int(space[1]) if space else 0))
  return tuple(out)


def _closing(text: str, start: int) -> int:
  """The index of the parenthesis that matches the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[i], 0)
    if depth == 0:
      return i
  raise ValueError(f"unbalanced parentheses: {text}")


def _instruction(line: str) -> Instruction:
  name, rest = line.removeprefix("ROOT ").split(" = ", 1)
  end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  open_at = rest.index("(")
  close = _closing(rest, open_at)
  called = []
  for group in _CALLED.findall(rest[close:]):
    called += re.findall(r"[\w.\-]+", group)
  return Instruction(
    name=name.lstrip("%"),
    op=rest[:open_at],
    arrays=_arrays(shape),
    operands=tuple(re.findall(r"%([\w.\-]+)", rest[open_at:close])),
    called=tuple(called),
    line=line,
  )


class Program:
  """A compiled program, parsed from its text."""

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.roots: dict[str, str] = {}
    self.entry, here = "", None
    for line in text.splitlines():
      head = _HEAD.match(line)
      if head:
        name = head[2]
        here = self.computations[name] = {}
        self.entry = name if head[1] else self.entry
      elif here is not None and line.startswith("  ") and " = " in line:
        instruction = _instruction(line.strip())
        here[instruction.name] = instruction
        if line.strip().startswith("ROOT "):
          self.roots[name] = instruction.name

  def total(
    self,
    weigh: Callable[[str, Instruction], float],
    name: str | None = None,
    side: Callable[[list[float]], float] = max,
  ) -> float:
    """The sum of `weigh(computation, instruction)` over the instructions of one run of the program.

    Loop bodies count as often as they run; a conditional counts `side` of its branches' sums.
    """
    name = name or self.entry
    out = 0.0
    for instruction in self.computations[name].values():
      inner = [self.total(weigh, c, side) for c in self._runs_of(instruction)]
      if instruction.op == "conditional":
        out += side(inner)
      else:
        out += self.trips(instruction) * sum(inner)
      out += weigh(name, instruction)
    return out

  def _runs_of(self, instruction: Instruction) -> list[str]:
    """The computations it runs; for a loop only the body, since its condition only compares a number."""
    if instruction.op == "while":
      return [re.search(r"body=%?([\w.\-]+)", instruction.line)[1]]
    return list(instruction.called) if _runs(instruction) else []

  def trips(self, instruction: Instruction) -> int:
    """How often a loop's body runs: the known trip count, else the only constant in its condition
    (the bound of a count from zero), else 1."""
    if instruction.op != "while":
      return 1
    if found := _TRIPS.search(instruction.line):
      return int(found[1])
    condition = re.search(r"condition=%?([\w.\-]+)", instruction.line)[1]
    bounds = [
      int(found[1])
      for i in self.computations[condition].values()
      if (found := re.search(r"s32\[\]\S* constant\((\d+)\)", i.line))
    ]
    return bounds[0] if len(bounds) == 1 else 1

  def count(self, wanted: Callable[[Instruction], bool]) -> float:
    """The number of instructions for which `wanted` holds, in one run of the program."""
    return self.total(lambda _, instruction: float(wanted(instruction)))

  def inside_steps(self) -> str:
    """The body of the first loop (one step of a multi-step program), or the entry if there is no loop."""
    for instruction in self.computations[self.entry].values():
      if instruction.op == "while":
        return self._runs_of(instruction)[0]
    return self.entry

  def total_of(self, op: str, name: str) -> float:
    """The number of `op` instructions in one run of a computation."""
    return self.total(lambda _, instruction: float(instruction.op == op), name)

  def copies_of(self, size: int) -> float:
    """Copies and transposes of arrays of at least `size` bytes in one run of the program."""

    def large(_, instruction):
      copied = instruction.op in ("copy", "copy-start", "transpose")
      return float(copied and any(a.bytes >= size for a in instruction.arrays))

    return self.total(large)

  # -- kernels and messages --------------------------------------------------------------------

  def kernels(self, side: Callable[[list[float]], float] = max) -> float:
    """Kernel launches on a GPU: scheduled instructions except free ones, control flow and collectives.

    Args:
      side: which branch of a condition runs; `min`: the shorter one.
    """
    return self.total(lambda _, instruction: float(_is_kernel(instruction)), side=side)

  def collectives(self) -> dict[str, float]:
    """Kind -> the number of collectives; an asynchronous pair counts as one."""
    return {
      kind: n
      for kind in COLLECTIVES
      if (n := self.count(lambda i, kind=kind: i.op in (kind, f"{kind}-start")))
    }

  # -- traffic -----------------------------------------------------------------------------------

  def traffic(self) -> float:
    """Bytes read from and written to the device's main memory in one run."""
    return self.total(self.moved)

  def moved(self, computation: str, instruction: Instruction) -> float:
    """Bytes of main memory read and written by one scheduled instruction."""
    op = instruction.op
    if op in _FREE or op.endswith(("-done", "-update")) or _runs(instruction):
      return 0.0
    body = self.computations[computation]
    operands = [body[name] for name in instruction.operands if name in body]
    sources = [sum(_main(a) for a in operand.arrays) for operand in operands]
    result = sum(_main(a) for a in instruction.arrays)
    if op == "copy-start":
      return sum(_main(a) for a in instruction.arrays[:2])
    if op == "slice-start":
      source, target = instruction.arrays[0], instruction.arrays[1]
      return target.bytes * ((source.space == 0) + (target.space == 0))
    if op.endswith("-start"):
      return sum(sources) + sum(_main(a) for a in instruction.arrays[len(operands) :])
    if op == "dynamic-update-slice":
      written = operands[1].arrays[0].bytes * (instruction.arrays[0].space == 0)
      return written + sum(sources[1:])
    if op in _SLICING:
      read = sum(a.bytes for a in instruction.arrays) * (operands[0].arrays[0].space == 0)
      return read + result + sum(sources[1:])
    if op == "scatter":
      return sum(sources[1:]) + sources[-1]
    if op == "fusion":
      return self._moved_by_fusion(instruction, operands)
    return sum(sources) + result

  def _moved_by_fusion(self, instruction: Instruction, operands: list[Instruction]) -> float:
    name = instruction.called[0]
    out = 0.0
    for i, operand in enumerate(operands):
      whole = sum(_main(a) for a in operand.arrays)
      out += min(whole, self._read(name, i)) if whole else 0.0
    for array, written in zip(instruction.arrays, self._written(name), strict=False):
      out += min(array.bytes, written) if array.space == 0 else 0.0
    return out

  @functools.cache  # noqa: B019 (a Program lives as long as its caches)
  def _read(self, name: str, parameter: int) -> float:
    """Bytes that a fusion reads of one operand: only the slices if every use is a slice, and nothing if
    the operand is only the buffer that a slice is written into."""
    body = self.computations[name]
    source = next(
      i for i in body.values() if i.op == "parameter" and f"parameter({parameter})" in i.line
    )
    return min(self._uses(name, source.name), sum(a.bytes for a in source.arrays))

  def _uses(self, name: str, source: str) -> float:
    body, out = self.computations[name], 0.0
    if self.roots[name] == source:
      return math.inf  # passed on whole
    for user in body.values():
      for place, operand in enumerate(user.operands):
        if operand != source:
          continue
        if user.op in _SLICING:
          out += sum(a.bytes for a in user.arrays) if place == 0 else math.inf
        elif user.op in ("dynamic-update-slice", "scatter"):
          out += 0.0 if place == 0 else math.inf
        elif user.op in ("bitcast", "get-tuple-element") or (
          user.op == "fusion" and self._passes_on(user.called[0], place)
        ):
          out += self._uses(name, user.name)
        elif user.op == "fusion":
          out += self._read(user.called[0], place)
        else:
          out += math.inf
    return out

  def _passes_on(self, name: str, parameter: int) -> bool:
    """Whether a nested fusion only reshapes its operand."""
    body = self.computations[name]
    end = body[self.roots[name]]
    while end.op == "bitcast":
      end = body[end.operands[0]]
    return end.op == "parameter" and f"parameter({parameter})" in end.line

  @functools.cache  # noqa: B019
  def _written(self, name: str) -> tuple[float, ...]:
    """Bytes that a fusion writes to each array of its result; an in-place update counts only its slice."""
    body = self.computations[name]

    def written(instruction: Instruction) -> float:
      while instruction.op == "bitcast":
        instruction = body[instruction.operands[0]]
      if instruction.op == "dynamic-update-slice":
        return body[instruction.operands[1]].arrays[0].bytes
      if instruction.op == "scatter":
        return body[instruction.operands[-1]].arrays[0].bytes
      if instruction.op == "fusion":
        return self._written(instruction.called[0])[0]
      return math.inf

    root = body[self.roots[name]]
    if root.op == "tuple":
      return tuple(written(body[operand]) for operand in root.operands)
    return (written(root),) * len(root.arrays)


def _runs(instruction: Instruction) -> bool:
  """Whether the computations it calls are scheduled separately, not fused into one kernel."""
  return instruction.op in ("while", "conditional", "call", "async-start")


def _is_kernel(instruction: Instruction) -> bool:
  op = instruction.op.removesuffix("-start")
  if instruction.op in _FREE or instruction.op.endswith("-done") or _runs(instruction):
    return False
  return op not in COLLECTIVES


def _main(array: Array) -> int:
  return array.bytes if array.space == 0 else 0
