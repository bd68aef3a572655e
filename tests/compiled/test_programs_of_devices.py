"""What a GPU's and a TPU's compiler make of a step: counted, not run.

A donated AdamW step in float32. Bytes are in units of the gradients: the step alone
moves seven, reading the gradients once more makes eight. `QUICK` is a model of 11
leaves with matrices as large as those of the one of 61, where a figure does not
depend on the number of leaves.
"""

import pytest

from benchmarks import _targets
from benchmarks import compiled

QUICK = {"quick": True}

# The clips and guards of this library, but for clips of singular values: these choose
# between matmuls by conditionals (docs/spectral.md), and compile for minutes.
OURS = [x for x in filter(compiled.is_ours, compiled.methods()) if "spectral" not in x]
GUARDS = [
  f"{how}, {guard}"
  for how in ("guarded_step", "update")
  for guard in ("skip_nonfinite", "skip_spikes", "dynamic_loss_scale", "everything")
]
BY_UPDATE = [name for name in GUARDS if name.startswith("update")]
LIKE_OPTAX = {
  "clip_by_global_norm": "optax.clip_by_global_norm",
  "clip_by_block_rms": "optax.clip_by_block_rms",
  "clip_by_layer_norm": "optax.clip_by_block_rms",
}
UNIT, OPTAX_UNIT = "adaptive_grad_clip", "optax.adaptive_grad_clip"
CLIP = "clip_by_global_norm"


def needs(name):
  """Skips what needs a compiler that is not installed, and says which."""
  missing = _targets.missing(name)
  return pytest.mark.skipif(missing is not None, reason=missing or "")


TARGETS = [pytest.param(name, marks=needs(name)) for name in ("h100", "tpu-v5e")]
# The most bytes of AGC, with matrices as those of the model of 61 leaves: it reads
# gradients and parameters once, and writes and reads sums of some rows each.
AGC_BYTES = {
  "h100": {"float32": 9.15, "bfloat16": 9.25},
  "b200": {"float32": 9.15, "bfloat16": 9.4},
  "rtx4090": {"float32": 9.15, "bfloat16": 9.25},
  "rtx5090": {"float32": 9.15, "bfloat16": 9.25},
  "mi300x": {"float32": 9.3, "bfloat16": 9.6},
  "intel-max": {"float32": 9.3, "bfloat16": 9.6},
}
GPUS = [pytest.param(name, marks=needs(name)) for name in AGC_BYTES]
# Each has a form of its own, or its sums in another place.
FEW = (CLIP, "clip_by_layer_norm", "zclip", "update, skip_nonfinite")


@needs("h100")
class TestH100:
  @pytest.mark.parametrize("method", OURS)
  def test_the_host_is_never_waited_for(self, figures, method):
    assert figures("h100", method, **QUICK)["conditionals"] == 0

  def test_clips_of_singular_values_let_the_host_wait_twice_at_most(self, figures):
    """What the norm decides, and what is proven to be within, is left in place."""
    found = figures("h100", "spectral_clip", model="one matrix", **QUICK)
    assert (found["conditionals"], found["waits"]) == (1, 2)
    rescaled = figures("h100", "clip_by_spectral_norm", model="one matrix", **QUICK)
    assert rescaled["waits"] == 0

  @pytest.mark.parametrize("method", GUARDS)
  def test_a_guard_holds_no_copy_and_reads_once(self, figures, method):
    found = figures("h100", method, **QUICK)
    assert found["temp_copies"] <= 0.01
    assert found["bytes"] <= (8.1 if "everything" in method else 8.05)

  @pytest.mark.parametrize("method", LIKE_OPTAX)
  def test_no_more_kernels_than_optax(self, figures, method):
    peer = figures("h100", LIKE_OPTAX[method])
    assert figures("h100", method)["kernels"] <= peer["kernels"]

  def test_agc_has_hardly_more_kernels_than_optax(self, figures):
    peer = figures("h100", OPTAX_UNIT)
    assert figures("h100", UNIT)["kernels"] <= 1.1 * peer["kernels"]


@pytest.mark.parametrize("target", GPUS)
class TestGPUs:
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_agc_reads_gradients_and_parameters_once(self, figures, target, dtype):
    found = figures(target, UNIT, dtype=dtype, **QUICK)
    assert found["bytes"] <= AGC_BYTES[target][dtype]
    assert found["temp_copies"] <= 0.05
    assert found["conditionals"] == 0

  @pytest.mark.parametrize("method", FEW)
  def test_the_rest_reads_gradients_once_and_never_waits(self, figures, target, method):
    found = figures(target, method, **QUICK)
    assert found["bytes"] <= 8.05
    assert found["temp_copies"] <= 0.05
    assert found["conditionals"] == 0


@needs("tpu-v5e")
class TestV5e:
  @pytest.mark.parametrize("method", LIKE_OPTAX)
  def test_no_more_kernels_than_optax(self, figures, method):
    peer = figures("tpu-v5e", LIKE_OPTAX[method])
    assert figures("tpu-v5e", method)["kernels"] <= peer["kernels"]

  def test_agc_has_no_more_kernels_than_optax(self, figures):
    peer = figures("tpu-v5e", OPTAX_UNIT)
    assert figures("tpu-v5e", UNIT)["kernels"] <= peer["kernels"]

  def test_agc_reads_gradients_and_parameters_once(self, figures):
    # Less than nine, as some of them stay on the chip.
    assert figures("tpu-v5e", UNIT)["bytes"] <= 8.9

  @pytest.mark.parametrize("method", BY_UPDATE)
  def test_a_guard_holds_no_copy_and_reads_once(self, figures, method):
    found = figures("tpu-v5e", method)
    # What the clip inside holds on the chip; norms of layers need a little more.
    clip = "adagc" if "everything" in method else CLIP
    held = figures("tpu-v5e", clip)["temp_copies"]
    assert found["temp_copies"] <= max(0.06, held + 0.005)
    assert found["bytes"] <= 7.9


@pytest.mark.parametrize("target", TARGETS)
class TestBoth:
  @pytest.mark.parametrize("method", [CLIP, "clip_by_layer_norm", UNIT])
  def test_one_all_reduce_over_eight_devices(self, figures, target, method):
    found = figures(target, method, devices=8, **QUICK)
    assert found["most_collectives"] == {"all-reduce": 1}

  @pytest.mark.parametrize("layers", [False, True])
  def test_a_guard_and_its_clip_measure_once(self, figures, target, layers):
    guarded = "update, skip_nonfinite" + ", record=layers" * layers
    # What stays on a TPU's chip from one kernel to the next varies a little.
    least = figures(target, CLIP)["bytes"]
    assert figures(target, guarded)["bytes"] <= least + 0.2 * (target != "h100") + 0.01
