"""Which types the signatures use.

Trees are `Any`: parameters are dictionaries in one library and modules in another, and
JAX has no type for what it accepts as a tree.
"""

from collections.abc import Callable
from typing import Any
from typing import Literal
from typing import TypeAlias

from jax.typing import ArrayLike
import numpy as np

# Any tree: of arrays, of settings, of specs.
PyTree: TypeAlias = Any
# A tree of floating or complex arrays; a tree of parameters; a state of optax.
Updates: TypeAlias = Any
Params: TypeAlias = Any
OptState: TypeAlias = Any

# Keywords of `update` that its caller added.
ExtraArgs: TypeAlias = dict[str, Any]
# What arrays know as their dtype.
DType: TypeAlias = np.dtype[Any]

# A number that may be traced; a number, or a function from the step to one.
Scalar: TypeAlias = ArrayLike
ScalarOrSchedule: TypeAlias = ArrayLike | Callable[[Any], ArrayLike]

# Mesh axes; "auto" reads them from the types of arrays.
AxisName: TypeAlias = str | tuple[str, ...]
# A tree of `jax.sharding.PartitionSpec`, or a prefix of one.
Specs: TypeAlias = Any
# Axes of a leaf that belong to one unit: `None` goes by rank.
UnitAxis: TypeAlias = Any

# What to do with a step whose norms are not finite, and what to record.
Nonfinite: TypeAlias = Literal["propagate", "zero"]
Recording: TypeAlias = bool | Literal["layers"]
GuardRecording: TypeAlias = Literal[True, "layers"]
