"""Which cases of parametrised tests stand in the default run.

What a test says does not always depend on the method, or on the dtype: that a state may
be donated is a matter of how a state is made, of which there are four kinds. Of such a
test the default run takes one case of each kind, and `pytest -m every` the others, as
`.ci/run` does. Oracles, what passes bit for bit, finiteness and memories are asked of
all methods in the default run.

Compiling is nearly all of the time: a case that shares its program with others costs
nothing, and is not left out.
"""

# One of each kind: a fixed limit, units and weights, a threshold that learns, a chain.
KINDS = ("clip_by_global_norm", "adaptive_grad_clip", "zclip", "stable_spam")
FIXED = KINDS[:2]
# What others' wrappers see: a state with and without a memory.
WRAPPED = (KINDS[0], KINDS[2])
LEARNED = ("autoclip", "zclip", "clip_by_layer_percentile")
GUARDS = ("skip_nonfinite", "skip_spikes", "dynamic_loss_scale", "both")
WIDE = ("float32", "bfloat16")

# For each test the words of which one stands in the id of a case that stays. The words
# of an id are what stands between its hyphens. Without words no case stays.
STAYS: dict[str, dict[str, tuple[str, ...]]] = {
  "laws/test_contract.py": {
    "test_a_restored_state_continues_bit_for_bit": (*WRAPPED, "adagc"),
    "test_updates_are_those_of_the_oracle": (
      "bfloat16",
      *(f"float32-{name}" for name in FIXED[:1]),
    ),
    "test_without_jit_the_result_is_the_same": FIXED[:1],
    "test_every_order_is_that_of_the_oracle": (
      "1-clip_by_global_norm",
      "3",
      "inf-adaptive_grad_clip",
    ),
    "test_float64_stays_float64": ("clip_by_global_norm", "clip_by_block_rms"),
    "test_complex_updates_are_those_of_the_oracle": FIXED[:1],
    "test_arrays_without_elements_pass_and_do_not_count": (
      *FIXED,
      "clip_by_group_norm",
    ),
    "test_scalars_and_plain_arrays_are_trees": ("clip", *FIXED[:1]),
    "test_numpy_leaves_and_python_floats_are_taken": FIXED[:1],
    "test_weak_types_stay": ("clip", *WRAPPED[:1]),
    "test_within_the_limit_nothing_changes": WIDE,
    "test_zeros_stay_zeros_with_their_signs": (
      *KINDS,
      "clip_by_layer_norm",
      "clip_by_history",
    ),
    "test_complex_updates_within_the_limit_do_not_change": FIXED[:1],
    "test_within_the_limit_nothing_changes_without_jit": FIXED,
    "test_finite_updates_are_clipped_to_the_limit": WIDE,
    "test_float64_over_its_whole_range": FIXED,
    "test_grad_and_jvp_are_finite": KINDS[:2],
    "test_every_order_has_a_finite_derivative_at_zero": ("1", "3"),
    "test_init_and_update_return_states_of_one_kind": (
      *(f"bfloat16-{name}" for name in KINDS),
    ),
    "test_no_two_fields_share_a_buffer": KINDS[2:],
    "test_donated_updates_and_states_work": KINDS[:3:2],
    "test_vmap_is_a_loop": KINDS[2:3],
    "test_chain": (KINDS[0], "clippy"),
    "test_masked_clips_only_what_is_selected": FIXED,
    "test_multi_transform_clips_each_label_on_its_own": FIXED[:1],
    "test_inject_hyperparams_with_mixed_dtypes": (KINDS[0], "clip"),
    "test_injected_thresholds_change_without_recompiling": FIXED,
    "test_multi_steps_clips_the_mean": WRAPPED[1:],
    "test_apply_if_finite_rejects_and_goes_on": WRAPPED[1:],
    "test_metrics_are_read_through_every_wrapper": (),
    "test_the_step_after_a_non_finite_one_does_not_know_of_it": (
      *(f"propagate-{name}" for name in (*KINDS, *LEARNED, "adagc")),
      "zero-zclip",
    ),
    "test_scan_over_steps": KINDS[1:3],
    "test_empty_trees_pass": KINDS,
    "test_limits_and_norms_of_any_size_go_together": (*FIXED, "clip_by_layer_norm"),
    "test_a_norm_equal_to_the_limit_is_within_it": ("propagate",),
  },
  "laws/test_against_optax.py": {
    "test_agc_agrees_for_given_axes": ("0",),
    "test_unitwise_norm_agrees": ("shape2", "shape4"),
    "test_unitwise_clip_agrees": ("shape1",),
    "test_derivative_at_zero": FIXED[:1],
    "test_bfloat16_result_above_its_limit": (),
    "test_unrecorded_states_are_those_of_optax": FIXED[:1],
    "test_transformations_agree": ("clip", *FIXED[:1], "clip_by_block_rms"),
    "test_float16_whose_square_overflows": (),
    "test_agc_of_float16": (),
    "test_unitwise_norm_agrees_for_given_axes": ("0", "axis2"),
  },
  "laws/test_bad_input.py": {
    "test_rank_beyond_five": (),
  },
  "laws/test_compositions.py": {
    "test_laws": ("observe", "strict"),
  },
  "laws/test_counters.py": {"test_steps_go_on": (*KINDS[::2], "skip_spikes")},
  "laws/test_derivatives.py": {
    "test_a_step_that_was_taken_depends_on_them_as_without_a_guard": ("skip_spikes",),
    "test_a_step_that_was_not_taken_does_not_depend_on_its_gradients": (
      "skip_spikes-update",
    ),
    "test_nor_does_that_of_one_member_of_an_ensemble": (),
    "test_by_the_updates_of_which_it_takes_the_norm": WIDE[1:],
  },
  "laws/test_edge_cases.py": {
    "test_array_thresholds_do_not_change_dtypes": WIDE[1:],
    "test_a_nonfinite_element_gives_zeros_with_zero": WIDE[1:],
    "test_all_zero_is_unchanged_with_norm_0": WIDE[1:],
    "test_max_norm_inf_is_unchanged": WIDE[1:],
    "test_max_norm_0_gives_zeros": WIDE[1:],
    "test_a_schedule_is_evaluated_at_each_step": FIXED,
    "test_float16_weights_and_updates_are_measured_in_float32": ("float16",),
  },
  "laws/test_equivariance.py": {
    "test_limits_and_updates_have_the_units_of_gradients": LEARNED,
    "test_so_has_a_suggestion": (),
  },
  "laws/test_stacked.py": {
    "test_one_expert_of_one_layer_explodes": ("adagc",),
    "test_stacked_layers_are_clipped_as_separate_ones": ("clip_by_layer_norm",),
    "test_linen_scan": (),
  },
  "guards/test_loss_scale.py": {
    "test_scales_of_which_not_all_are_powers_of_two": (),
    "test_elements_count_and_not_their_norm": ("float16",),
    "test_subnormals_of_float16": ("layers in global",),
  },
  "guards/test_signals.py": {
    "test_a_spike_does_not_raise_the_limit_it_is_judged_by": ("capped",),
  },
  "guards/test_skip.py": {
    "test_healthy_steps_are_those_of_the_transformation_inside": GUARDS[:1],
    "test_scan_and_vmap": (),
    "test_states_keep_their_types_and_are_donated": GUARDS[:1],
    "test_weakly_typed_updates_stay_weakly_typed": GUARDS[:1],
    "test_a_broken_step_changes_nothing": ("both",),
    "test_flax_nnx_loop": (),
    "test_flax_linen_loop": (),
  },
  "functions/test_clip_tree.py": {
    "test_it_divides_by_the_limit": ("0.7-bfloat16", "1000.0-bfloat16"),
    "test_each_is_clipped_by_its_own_norm": WIDE[1:],
    "test_derivatives": (),
  },
  "functions/test_functions.py": {
    "test_per_example_layer": WIDE[:1],
    "test_per_example_global": WIDE[1:],
    "test_unitwise_norm": WIDE[1:],
    "test_unitwise_norm_over_given_axes": ("-1", "axis3"),
    "test_unitwise_clip": WIDE[1:],
    "test_per_example_under_jit_and_with_a_traced_limit": (),
    "test_global_norm": WIDE,
  },
  "functions/test_per_example.py": {
    "test_derivatives_are_those_of_the_others": (),
    "test_the_others_are_summed_as_if_it_were_not_there": (
      "bfloat16-nan-per_example_layer_norm_clip",
      "bfloat16-inf-per_example_layer_norm_clip",
    ),
    "test_finite_examples_are_summed_as_by_default": ("per_example_layer_norm_clip",),
    "test_by_default_it_is_seen": ("per_example_layer_norm_clip",),
    "test_a_batch_of_bad_examples_is_zero": ("per_example_layer_norm_clip",),
  },
  "functions/test_qk_clip.py": {
    "test_layouts": ("2",),
    "test_exact_logits_exceed_tau_by_the_documented_rounding_at_most": WIDE[1:],
    "test_a_logit_without_negative_terms_never_exceeds_tau_at_all": WIDE[1:],
    "test_the_largest_logits": WIDE[1:],
    "test_layers_that_are_stacked": ("1",),
  },
  "norms/test_ratios.py": {
    "test_weights_may_be_of_several_dtypes": ("unit_norm",),
    "test_leaves_of_unlike_dtypes_meet_their_own_weights": (
      "measure0-fdf ffd",
      "measure1-fdd ddf",
    ),
    "test_is_a_limit_of_zero_where_weights_are_zero": (f"{KINDS[1]}-zero",),
    "test_a_large_ratio_scales_its_own_leaf": ("relative layer_rms",),
  },
  "norms/test_scalars.py": {
    "test_units_side_by_side_are_as_leaf_by_leaf": ("cpu-True", "gpu-True"),
    "test_a_vector_is_taken_apart_bit_for_bit": ("17", "257"),
  },
  "report/test_layers.py": {
    "test_a_norm_merged_of_layers_is_that_of_float64": ("2", "1e-30-3"),
    "test_each_layer_against_float64": ("global",),
    "test_a_bad_step_names_the_first_layer_that_is_not_finite": ("stacked",),
    "test_through_wrappers": ("MultiSteps", "masked"),
    "test_derivatives_are_those_without_the_record": (),
    "test_donation_scan_and_vmap": (),
  },
  "report/test_metrics.py": {
    "test_through_wrappers": ("jit-all of them", "jit-MultiSteps"),
    "test_counters": (f"{KINDS[0]}-propagate", f"{KINDS[1]}-zero"),
  },
  "guards/test_observe.py": {
    "test_updates_are_passed_on_bit_for_bit": ("bfloat16",),
    "test_through_wrappers": ("alone", "MultiSteps", "around skip_nonfinite"),
    "test_a_history_of_any_scale": ("1e+200",),
    "test_the_norm_is_measured_once": ("observed, guarded-guarded",),
  },
  "report/test_records.py": {
    "test_a_norm_beyond_float32_is_recorded_as_the_largest": FIXED,
    "test_guards_too": (),
    "test_the_norm_is_that_of_the_last_step_whether_taken_or_not": ("update",),
    "test_a_guard_in_a_guard": (),
  },
  "report/test_watching.py": {
    "test_is_the_norm_of_what_comes_out": ("clip", *FIXED[:1]),
  },
  "thresholds/test_custom_parts.py": {
    "test_a_measure_may_call_what_the_package_offers": ("unitwise_norm-observe",),
  },
  "thresholds/test_geometric.py": {
    "test_an_early_spike_is_bounded_by_the_first_norms": ("zclip",),
    "test_after_the_warm_up_it_is_the_papers_limit": ("zclip",),
    "test_what_says_nothing_leaves_the_state": ("nan",),
  },
  "thresholds/test_learned_faults.py": {
    "test_memory_is_as_without_the_step": (
      *(f"propagate-{name}" for name in (*LEARNED, "adagc")),
      "zero-zclip",
    ),
    "test_parameters_stay_finite_and_the_next_spike_is_caught": (
      *LEARNED,
      "adagc",
      "clip_by_history",
    ),
  },
  "thresholds/test_learned_state.py": {
    "test_every_threshold_works_with_every_measure": (),
    "test_inject_hyperparams_changes_nothing": ("zclip", "clip_by_history"),
    "test_derivatives_are_finite_at_zero": ("autoclip",),
    "test_memory_is_float32_whatever_the_updates_are": ("float64", "bfloat16"),
    "test_an_ensemble_is_its_members": ("adagc",),
    "test_multi_steps_learns_once_per_step": ("adagc",),
    "test_a_restored_checkpoint_continues_bit_for_bit": ("zclip",),
    "test_metrics_show_norm_and_limit": (*LEARNED[:2], "adagc", "stable_spam"),
  },
  "thresholds/test_learned_traces.py": {
    "test_a_huge_finite_norm_leaves_a_useful_memory": LEARNED[1:],
    "test_percentile": ("100",),
  },
  "thresholds/test_learned_vectors.py": {
    "test_soft_actions_in_half_precision": ("bfloat16-rational", "float16-tanh"),
    "test_soft_actions_differentiate_at_zero": ("rational", "floored"),
  },
  "thresholds/test_limits.py": {
    "test_it_measures_and_never_clips": tuple(f"None-{name}" for name in FIXED),
    "test_what_is_traced_or_a_schedule_is_meant": FIXED[:1],
    "test_it_stays_0": FIXED,
  },
  "report/test_convert.py": {
    "test_wrappers_of_optax": ("labels", "named_chain"),
    "test_a_run_goes_on_as_if_nothing_had_changed": ("record-msgpack",),
    "test_what_it_learned_outlives_records_names_and_guards": LEARNED[1:],
    "test_an_optimizer_of_nnx": (),
    "test_its_own_state_is_kept_whole": KINDS,
    "test_a_train_state": (),
  },
  "guards/test_eager.py": {
    "test_eager_and_compiled_steps_agree": ("guards",),
    "test_methods": (KINDS[1], "clip_by_layer_norm", "adagc"),
    "test_guards": ("skip", "guards", "layers"),
  },
  "matrices/test_clip.py": {
    "test_one_norm_of_all_decides_for_all": (),
    "test_limits_by_shape_are_those_of_the_formula": (),
    "test_derivatives_are_differences": (),
    "test_matrices_stacks_and_kernels": (),
    "test_experts_and_heads_are_matrices_each": (),
    "test_complex_matrices": (),
    "test_vectors_and_scalars_have_their_norm": (),
    "test_records_name_the_proven_norm_of_each_layer": (),
    "test_every_threshold_works": (),
    "test_models_side_by_side": (),
    "test_the_soft_form_is_that_of_its_formula": (),
    "test_strict_leaves_nothing_above": (),
    "test_no_result_exceeds_its_limit_and_what_is_within_passes": WIDE[1:],
    "test_in_the_form_of_gpus_the_promise_is_the_same": (),
    "test_a_matrix_that_passes_is_not_recorded_as_clipped": (),
  },
  "matrices/test_certificate.py": {
    "test_it_is_differentiable": (),
    "test_less_precision_breaks_the_proof": (),
  },
  "guards/test_guard_records.py": {
    "test_nor_once_a_step_that_was_not_finite_is_over": ("losses1-skip_spikes",),
    "test_before_the_first_step_and_after_steps": ("layers-skip_spikes",),
    "test_debugging_of_nans_passes_a_healthy_run": (
      "jitted-skip_spikes",
      "eager-skip_nonfinite",
    ),
    "test_are_counted_each": ("skip_spikes",),
  },
  "guards/test_handed.py": {
    "test_lbfgs": ("skip",),
    "test_sam": ("skip", "scale"),
    "test_closed_keywords": ("skip", "scale"),
  },
  "laws/test_nesting.py": {
    "test_laws_of_the_sample": ("eager", "masked"),
  },
  "trees/test_groups.py": {
    "test_it_passes_bit_for_bit_whatever_the_norm_is": ("1.0-bfloat16", "nan-bfloat16"),
    "test_axes_by_path": (),
    "test_axes_by_name": (),
  },
  "trees/test_leaves.py": {
    "test_no_array_of_a_state_is_empty": (*LEARNED, "stable_spam"),
    "test_the_others_are_updated_as_without_them": ("adagc",),
    "test_a_model_may_have_leaves_that_get_no_updates": (
      *(f"{name}-float0" for name in KINDS),
      "skip_spikes-float0",
    ),
    "test_dtypes_are_never_promoted_implicitly": (*FIXED[:1], "skip_spikes"),
  },
  "trees/test_matrix_optimizers.py": {
    "test_labels_are_the_leaves_that_muon_takes": ("a tree",),
    "test_the_rules_differ": (),
    "test_what_other_leaves_leave_of_muons_update": (),
  },
  "guards/test_order.py": {
    "test_the_scale_falls_until_nothing_overflows": (
      "skip(scale)",
      "scale(spikes)",
      "skip(scale(spikes))",
      "observe(scale)",
    ),
  },
  "logs/test_command.py": {
    "test_every_method_can_be_replayed": (*FIXED[:1], "zclip"),
  },
}


def stays(
  file: str, test: str, words: str, table: dict[str, dict[str, tuple[str, ...]]] = STAYS
) -> bool:
  """Returns whether a case stands in the default run.

  Args:
    file: the path of the test's file in `tests`.
    test: its name.
    words: the id of the case; empty if the test has one case.
    table: which cases stay.
  """
  keep = table.get(file, {}).get(test)
  if keep is None:
    return True
  # An id such as "1e-30" or "-1" has hyphens of its own.
  return any(f"-{word}-" in f"-{words}-" for word in keep)
