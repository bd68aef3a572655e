"""What the tests read from a traced or a compiled program."""

import re

import jax
import numpy as np
import optax


def adamw(*before):
  """AdamW after these transformations."""
  return optax.chain(*before, optax.adamw(1e-3))


def compiled_step(tx, params):
  """The compiled optimizer step, with donation as in training."""

  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = jax.eval_shape(tx.init, params)
  return planned(jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params))


def planned(lowered):
  """Compiles what is only looked at: as for users, but for LLVM's own optimisation."""
  return lowered.compile(compiler_options={"xla_backend_optimization_level": 0})


def temporary(compiled):
  """Bytes of temporaries."""
  return compiled.memory_analysis().temp_size_in_bytes


def size(params):
  """Bytes of float32 arrays."""
  return sum(4 * x.size for x in jax.tree.leaves(params))


class Computation:
  """One computation of a compiled program: its lines, by instruction name."""

  def __init__(self, text):
    self.lines = text.splitlines()[1:]

  def instructions(self, opcode):
    return [line for line in self.lines if re.search(rf" {opcode}\(", line)]


def computations(compiled):
  """The computations of a compiled program, by name; the entry is "ENTRY"."""
  text = compiled.as_text()
  blocks = re.findall(
    r"^(ENTRY )?%([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, flags=re.M | re.S
  )
  return {
    "ENTRY" if entry else name: Computation("\n" + body) for entry, name, body in blocks
  }


def reductions_by_size(compiled):
  """Element counts of what is reduced, outside of branches, one for each.

  XLA may reduce in stages; a stage after the first reads a small array.
  """
  blocks = computations(compiled)
  reached, queue = set(), ["ENTRY"]
  while queue:
    name = queue.pop()
    if name in reached or name not in blocks:
      continue
    reached.add(name)
    for line in blocks[name].lines:
      if " conditional(" in line:
        continue
      queue += re.findall(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)", line)
      for group in re.findall(r"called_computations=\{([^}]*)\}", line):
        queue += [part.strip().lstrip("%") for part in group.split(",")]
  sizes = []
  for name in reached:
    block = blocks[name]
    shapes = {}
    for line in block.lines:
      if found := re.match(r"\s*(?:ROOT )?%([\w.\-]+) = \w+\[([\d,]*)\]", line):
        dims = [int(d) for d in found[2].split(",") if d]
        shapes[found[1]] = int(np.prod(dims))
    for opcode in ("reduce", "reduce-window"):
      for line in block.instructions(opcode):
        operand = re.search(rf" {opcode}\((?:[^%,]* )?%([\w.\-]+)", line)
        sizes.append(shapes.get(operand[1], 0))
  return sizes


def bytes_accessed(compiled):
  """Bytes that are read and written, by XLA's count."""
  return compiled.cost_analysis()["bytes accessed"]


def equations(jaxpr):
  """All equations of a jaxpr, those of calls and branches too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
    ):
      inner = getattr(value, "jaxpr", value)
      if hasattr(inner, "eqns"):
        yield from equations(inner)


NAME = r"%[\w.\-]+"


def kernels(compiled):
  """The distinct fused computations: XLA's CPU backend compiles equal ones once."""
  found = set()
  for name, block in computations(compiled).items():
    if not name.startswith("fused"):
      continue
    body = re.sub(r", (metadata|backend_config)=\{.*", "", "\n".join(block.lines))
    order = {name: i for i, name in enumerate(dict.fromkeys(re.findall(NAME, body)))}
    found.add(re.sub(NAME, lambda match, order=order: f"%{order[match[0]]}", body))
  return found
