"""What a compiled step launches, moves and holds: counted in XLA's text.

XLA prints an optimised program as text. The counts say what every ordinary step does,
and are never a time.

*The path.* The entry computation, and the bodies of its calls and loops, a body as
often as its loop is known to run. A conditional adds one branch. If its results are
large (a share `LARGE` of the gradients), it guards the step, and the branch that moves
more takes the step. If they are small, it decides how to find a number, and the branch
that moves less is the ordinary one: the other measures all gradients again.

*A kernel.* Every instruction on the path that runs something: a fusion, a single
operation, a copy, a custom call or a collective. Instructions that only name buffers
(parameters, constants, tuples, bitcasts, barriers) do not count, nor does the end of
what another started, nor a caller beside what it calls, nor, on a TPU, a copy between
its memories that runs beside kernels (`copy-start`, `slice-start`). A kernel is *tiny*
if its operands and results have fewer than `TINY` bytes together: it costs its launch.

*Bytes.* Operands and results of these kernels in the device's main memory. A copy into
a TPU's memory on the chip counts once, where it happens. An operand that a fusion
slices counts as the slices, and one that it updates in place as the update.

*Collectives.* By kind, in all branches and bodies, each once however often it runs. A
start and its end are one. Beside them, the most that any one path runs.
"""

from collections.abc import Iterable
import functools
import re
from typing import Any
from typing import NamedTuple

TINY = 4096
LARGE = 0.05

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)

_FREE = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "opt-barrier",
  "after-all",
  "add-dependency",
  "partition-id",
  "replica-id",
  "domain",
}
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "Sharding", "SPMDFullToShardShape")
# Copies that the hardware runs beside kernels.
_TRANSFERS = {"copy-start", "slice-start", "dynamic-slice-start"}
_KNOWN_TRIPS = re.compile(r'known_trip_count"?:\{"n":"?(\d+)')
_SLICES = {"slice", "dynamic-slice", "gather"}

_SHAPE = re.compile(r"([a-z]+)(\d*)[a-z0-9]*\[([\d,<=]*)\](\{[^}]*\})?")


class Instruction(NamedTuple):
  """Holds one line of a program.

  Attributes:
    name: its name, without the percent sign.
    opcode: its operation, as `fusion`.
    shape: its shape, as XLA writes it.
    operands: the names of its operands.
    attributes: the text after the operands.
    root: whether it is the result of its computation.
  """

  name: str
  opcode: str
  shape: str
  operands: tuple[str, ...]
  attributes: str
  root: bool


class Counts(NamedTuple):
  """Counts what one path through a program does.

  Attributes:
    kernels: how many kernels it launches.
    tiny: how many of them are tiny.
    bytes: how many bytes they read and write.
    collectives: the most of each kind, in the order of `COLLECTIVES`, that a path
      with any branches runs.
  """

  kernels: int = 0
  tiny: int = 0
  bytes: float = 0
  collectives: tuple[int, ...] = (0,) * len(COLLECTIVES)


class Program:
  """Holds the computations of a compiled program."""

  def __init__(self, text: str, gradient_bytes: float):
    """Reads what `compiled.as_text()` returned.

    Args:
      text: the program.
      gradient_bytes: the bytes of all gradients on one device, as the unit.
    """
    self._gradient_bytes = gradient_bytes
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ""
    body: dict[str, Instruction] = {}
    for line in text.splitlines():
      if head := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
        body = self.computations.setdefault(head[2], {})
        if head[1]:
          self.entry = head[2]
      elif instruction := _instruction(line):
        body[instruction.name] = instruction

  @functools.cached_property
  def ordinary(self) -> Counts:
    """Counts what every ordinary step does."""
    return self._counts(self.entry)

  def count(self, opcode: str) -> int:
    """Counts instructions in all computations, a start and its end as one."""
    names = (opcode, f"{opcode}-start")
    return sum(
      x.opcode in names for body in self.computations.values() for x in body.values()
    )

  def waits(self) -> int:
    """Counts where a GPU's host waits for a condition, if no such loop takes a turn.

    XLA's runtime copies the condition of a branch to the host, and that of a loop whose
    number of turns the compiler does not know: after each turn, and once more.
    """
    return self._waits(self.entry)

  def _waits(self, name: str) -> int:
    total = 0
    for x in self.computations[name].values():
      if x.opcode == "conditional":
        total += 1 + max(map(self._waits, _called(x)))
      elif x.opcode == "while" and not _KNOWN_TRIPS.search(x.attributes):
        total += 1
      elif x.opcode in ("call", "while", "async-start"):
        total += _trips(x) * sum(map(self._waits, _called(x)))
    return total

  def row(self) -> dict[str, Any]:
    """Returns the figures of this program, as results have them."""
    found = self.ordinary
    return {
      "kernels": found.kernels,
      "tiny": found.tiny,
      "bytes": found.bytes / self._gradient_bytes,
      "conditionals": self.count("conditional"),
      "waits": self.waits(),
      "collectives": {
        kind: number for kind in COLLECTIVES if (number := self.count(kind))
      },
      "most_collectives": {
        kind: number
        for kind, number in zip(COLLECTIVES, found.collectives, strict=True)
        if number
      },
    }

  def _counts(self, name: str) -> Counts:
    body = self.computations[name]
    return _sum(self._instruction_counts(x, body) for x in body.values())

  def _instruction_counts(self, x: Instruction, body: dict[str, Instruction]) -> Counts:
    if x.opcode in _FREE or x.opcode.endswith(("-done", "-update-done")):
      return Counts()
    if x.opcode == "conditional":
      return self._branch(x)
    called = _called(x)
    if x.opcode in ("call", "while") or (x.opcode == "async-start" and called):
      inside = _sum(map(self._counts, called))
      times = _trips(x)
      return inside._replace(
        kernels=inside.kernels * times,
        tiny=inside.tiny * times,
        bytes=inside.bytes * times,
      )
    if x.opcode == "custom-call" and any(f'"{t}"' in x.attributes for t in _FREE_CALLS):
      return Counts()
    if x.opcode in _TRANSFERS:
      return Counts(bytes=_transferred(x))
    moved, size = self._moved(x, body)
    kind = x.opcode.removesuffix("-start")
    return Counts(
      1, int(size < TINY), moved, tuple(int(kind == k) for k in COLLECTIVES)
    )

  def _branch(self, x: Instruction) -> Counts:
    branches = [self._counts(name) for name in _called(x)]
    branches.sort(key=lambda counts: (counts.bytes, counts.kernels))
    guards = _size(x.shape) >= LARGE * self._gradient_bytes
    most = map(max, zip(*(b.collectives for b in branches), strict=True))
    return branches[-1 if guards else 0]._replace(collectives=tuple(most))

  def _moved(self, x: Instruction, body: dict[str, Instruction]) -> tuple[float, float]:
    """Returns the bytes that a kernel moves in main memory, and in any memory."""
    operands = [body[name] for name in dict.fromkeys(x.operands) if name in body]
    fused = self.computations[_called(x)[0]] if x.opcode == "fusion" else None
    if fused is None:
      # Counts as a fusion of this instruction alone.
      fused = {name: body[name]._replace(opcode="parameter") for name in x.operands}
      fused[x.name] = x._replace(root=True)
      inputs = {operand.name: [operand.name] for operand in operands}
    else:
      numbers = {
        int(p.attributes.split(")")[0]): p.name
        for p in fused.values()
        if p.opcode == "parameter"
      }
      inputs = {
        operand.name: [
          numbers[i] for i, n in enumerate(x.operands) if n == operand.name
        ]
        for operand in operands
      }
    moved = size = 0.0
    for operand in operands:
      whole = _size(operand.shape)
      used = max(_read(name, fused, whole) for name in inputs[operand.name])
      share = used / max(whole, 1)
      moved += share * _size(operand.shape, main=True)
      size += used
    for shape, written in _results(x, fused):
      moved += written if _size(shape, main=True) else 0
      size += written
    return moved, size


def _instruction(line: str) -> Instruction | None:
  line = re.sub(r"/\*.*?\*/", "", line)
  head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
  if not head:
    return None
  rest = line[head.end() :]
  stop = _closing(rest) if rest.startswith("(") else rest.index(" ")
  shape, rest = rest[:stop], rest[stop:].lstrip()
  opcode, _, rest = rest.partition("(")
  stop = _closing("(" + rest) - 1
  inside, attributes = rest[: stop - 1], rest[stop:]
  if opcode == "parameter":
    return Instruction(head[2], opcode, shape, (), inside + ")", bool(head[1]))
  names = tuple(re.findall(r"%([\w.\-]+)", inside))
  return Instruction(head[2], opcode, shape, names, attributes, bool(head[1]))


def _closing(text: str) -> int:
  """Returns the index after the bracket that closes the first one."""
  depth = 0
  for found in re.finditer(r"[()]", text):
    depth += 1 if found[0] == "(" else -1
    if depth == 0:
      return found.end()
  return len(text)


def _called(x: Instruction) -> list[str]:
  """Returns the computations that an instruction calls, or its branches."""
  found = re.findall(
    r"\b(?:calls|to_apply|body|condition|branch_computations|true_computation|"
    r"false_computation)=(\{[^}]*\}|%?[\w.\-]+)",
    x.attributes,
  )
  return [name for group in found for name in re.findall(r"[\w.\-]+", group)]


def _trips(x: Instruction) -> int:
  found = _KNOWN_TRIPS.search(x.attributes)
  return int(found[1]) if found else 1


def _leaves(shape: str) -> Iterable[tuple[float, bool, str]]:
  """Yields each array of a shape: bytes, whether in main memory, and XLA's text."""
  for found in _SHAPE.finditer(shape):
    kind, bits, dims, layout = found.groups()
    elements = 1
    for dim in filter(None, dims.split(",")):
      elements *= int(dim.lstrip("<="))
    width = {"pred": 8, "token": 0, "opaque": 0}.get(kind, int(bits or 8))
    # Only a TPU, which tiles its arrays, has memories to tell apart; a GPU's are one.
    on_chip = "T(" in (layout or "") and "S(" in (layout or "")
    yield elements * width / 8, not on_chip, found[0]


def _size(shape: str, main: bool = False) -> float:
  return sum(size for size, is_main, _ in _leaves(shape) if is_main or not main)


def _transferred(x: Instruction) -> float:
  """Returns the bytes that a copy between memories moves in main memory.

  Its shape holds source, target and flags. It may take a slice of the source only.
  """
  leaves = [leaf for leaf in _leaves(x.shape) if leaf[0] > 4]
  least = min((size for size, _, _ in leaves), default=0.0)
  return least * sum(main for _, main, _ in leaves)


def _read(name: str, fused: dict[str, Instruction], whole: float) -> float:
  """Returns how many bytes of an operand a fusion reads."""
  total = 0.0
  for user in fused.values():
    if name not in user.operands:
      continue
    if user.opcode == "bitcast" and not user.root:
      total += _read(user.name, fused, whole)
    elif user.opcode in _SLICES and user.operands[0] == name:
      total += _size(user.shape)
    elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
      continue
    else:
      return whole
  return min(total, whole)


def _results(
  x: Instruction, fused: dict[str, Instruction]
) -> Iterable[tuple[str, float]]:
  """Returns each result of a kernel, and how many bytes of it the kernel writes."""
  shapes = [(text, size) for size, _, text in _leaves(x.shape)]
  if x.opcode.endswith("-start") and x.opcode != "all-reduce-start":
    # The operands of a collective come first.
    shapes = shapes[len(x.operands) :]
  root = next(y for y in fused.values() if y.root)
  made = [fused[n] for n in root.operands] if root.opcode == "tuple" else [root]
  if len(made) != len(shapes):
    return shapes
  return [
    (text, _size(fused[m.operands[1]].shape) if _updates(m, fused) else size)
    for (text, size), m in zip(shapes, (_plain(m, fused) for m in made), strict=True)
  ]


def _updates(x: Instruction, fused: dict[str, Instruction]) -> bool:
  """Returns whether an instruction updates an operand of the kernel in place."""
  if x.opcode != "dynamic-update-slice":
    return False
  return _plain(fused[x.operands[0]], fused).opcode == "parameter"


def _plain(x: Instruction, fused: dict[str, Instruction]) -> Instruction:
  while x.opcode == "bitcast" and x.operands[0] in fused:
    x = fused[x.operands[0]]
  return x


def _sum(counts: Iterable[Counts]) -> Counts:
  every = list(counts)
  return Counts(
    sum(c.kernels for c in every),
    sum(c.tiny for c in every),
    sum(c.bytes for c in every),
    tuple(map(sum, zip(*(c.collectives for c in every), strict=True)))
    or Counts().collectives,
  )
