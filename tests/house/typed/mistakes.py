"""Arguments that a type checker has to refuse: one error for each line of calls."""

import optax

import optax_clip

optax_clip.clip_by_global_norm(1.0, nonfinite="skip")
optax_clip.clip_by_global_norm(1.0, record="layer")
optax_clip.skip_nonfinite(optax.sgd(0.1), record=False)
optax_clip.zclip(mode="adaptive")
optax_clip.clip_by_global_norm(max_norms=1.0)
