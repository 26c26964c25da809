"""Bugs that distillation and pipeline frameworks have shipped, and the tests here that fail if one is
reintroduced.

`GUARDS` is the index: the bug in one line -> tests, as "folder/file.py::function" below `tests/`.
"""

import ast
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).parent

GUARDS = {
    # Gradients
    "An all-reduce that autograd does not know of inside a loss: value right, gradient wrong": (
        "objectives/test_pitfalls.py::test_collectives_in_autograd_have_the_right_value_and_a_wrong_gradient",
        "objectives/test_linear_kl.py::test_loss_and_gradients",
        "objectives/test_divergence.py::test_value_and_gradient",
    ),
    "A gather whose backward adds up the ranks' equal losses: gradient as many times too large": (
        "objectives/test_pitfalls.py::test_a_differentiable_all_gather_gives_tp_times_the_gradient",
        "objectives/test_pitfalls.py::test_loss_and_gradient_do_not_depend_on_tp",
    ),
    "A detached divergence as the advantage of the sampled token: zero in expectation": (
        "objectives/test_pitfalls.py::test_which_sampled_token_losses_have_the_gradient_of_the_divergence",
        "objectives/test_pitfalls.py::test_the_per_token_divergence_cannot_be_differentiated",
        "run/test_alarms.py::test_combinations_with_a_wrong_gradient_are_refused",
    ),
    "The sampled token's log-ratio back-propagated: a gradient without the teacher in it": (
        "objectives/test_pitfalls.py::test_which_sampled_token_losses_have_the_gradient_of_the_divergence",
        "run/test_alarms.py::test_combinations_with_a_wrong_gradient_are_refused",
        "losses/test_objectives.py::test_batch_equals_the_equations",
    ),
    "Hidden states compared with their own tokens instead of the next ones": (
        "data/test_batching.py::test_a_hidden_state_predicts_the_token_after_it",
    ),
    "Student and teacher rounded differently: negative divergences": (
        "objectives/test_bad_input.py::test_linear_kl",
        "objectives/test_pitfalls.py::test_the_check_fails_wrong_inputs",
    ),
    "The textbook divergence turning negative where the models almost agree": (
        "objectives/test_pitfalls.py::test_the_textbook_form_goes_negative_and_ours_does_not",
        "objectives/test_linear_kl.py::test_near_convergence",
    ),
    "Memory that was never written read by a matrix product: padding beside odd rows, times 0, is NaN": (
        "objectives/test_unwritten_memory.py::test_products_of_rows_with_unwritten_padding_fail",
        "objectives/test_unwritten_memory.py::test_losses_of_states_and_heads_with_gaps_between_their_rows",
    ),
    "A gradient buffer of the head for every domain, teacher and term of a micro-batch": (
        "losses/test_head_gradient.py::test_twelve_domains_take_the_memory_of_one",
        "objectives/test_micro_batch_head.py::test_gradients_are_those_of_the_sum",
    ),
    # Normalization
    "A loss that depends on the micro-batch size, or is a mean of means": (
        "training/test_parallel_invariance.py::test_loss_gradients_and_weights_do_not_depend_on_the_layout",
        "training/test_parallel_invariance.py::test_named_reductions",
    ),
    "Padding, prompt tokens or padded vocabulary counted": (
        "data/test_batching.py::test_neither_prompts_nor_padding_count",
        "objectives/test_linear_kl.py::test_loss_and_gradients",
        "objectives/test_diagnostics.py::test_against_direct_computation",
    ),
    "Vocabularies padded to different widths, so that shards hold different tokens": (
        "objectives/test_bad_input.py::test_linear_kl",
        "objectives/test_bad_input.py::test_ranks_that_disagree",
    ),
    "A temperature for the student only": (
        "objectives/test_pitfalls.py::test_the_check_fails_wrong_inputs",
        "objectives/test_linear_kl.py::test_loss_and_gradients",
    ),
    "An auxiliary loss divided by another token count than the main loss": (
        "training/test_router_losses.py::test_the_coefficient_does_not_depend_on_where_responses_begin",
        "training/test_router_losses.py::test_gradients_equal_the_formulas",
        "training/test_parallel_invariance.py::test_loss_gradients_and_weights_do_not_depend_on_the_layout",
    ),
    # Teachers
    "The student's own checkpoint as teacher, or one of another model, unnoticed": (
        "run/test_alarms.py::test_a_teacher_that_equals_the_student_at_the_first_step",
        "run/test_alarms.py::test_a_teacher_that_has_nothing_in_common_with_the_student",
    ),
    "Gradient and optimizer memory for frozen teachers": (
        "training/test_teachers_leave_no_trace.py::test_teachers_leave_no_trace",
    ),
    "Every teacher run on every sample, and most of it thrown away": (
        # Its step asserts that each cached state is used exactly once.
        "training/test_parallel_invariance.py::test_loss_gradients_and_weights_do_not_depend_on_the_layout",
    ),
    "As many heads on the device as there are teachers": (
        "pipeline/test_plan.py::test_each_teacher_is_loaded_once_and_into_a_free_slot",
        "pipeline/test_plan.py::test_a_micro_batch_with_three_teachers_gets_three_heads",
    ),
    "A landing buffer shared by two arrivals: the next one's bytes decoded as this one's": (
        "teachers/test_hand_overs.py::test_delays_change_no_byte",
    ),
    "A copy on another stream into memory that the caller's stream has yet to clear": (
        "teachers/test_hand_overs.py::test_an_arrival_in_a_new_slot_waits_until_its_memory_is_cleared",
    ),
    # Pipelines and mixtures of experts
    "Ranks that share a collective with different numbers of micro-batches": (
        "data/test_division.py::test_every_rank_gets_as_many_micro_batches_and_every_trajectory_once",
        "pipeline/test_plan.py::test_unequal_counts_are_named",
    ),
    "A parameter that the loss of an empty micro-batch does not reach, while others wait for its gradient": (
        "training/test_empty_micro_batches.py::test_gradients_are_those_of_one_rank",
    ),
    "Work done ahead that leaves the next step too little room to begin": (
        "pipeline/test_simulate.py::test_look_ahead_leaves_the_room_that_the_next_step_needs",
        "training/test_look_ahead.py::test_a_tight_cache_ends_no_run_and_changes_no_loss",
    ),
    "Expert counts or auxiliary losses of the student changed by a teacher's forward": (
        "training/test_teachers_leave_no_trace.py::test_teachers_leave_no_trace",
    ),
    "Experts' gradients reduced over the ranks that share everything else": (
        "training/test_parallel_invariance.py::test_loss_gradients_and_weights_do_not_depend_on_the_layout",
        "fuzz_layouts/test_fuzz_layouts.py::test_a_layout_that_was_wrong_once",
        "fuzz_layouts/test_fuzz_layouts.py::test_a_planted_bug_is_found",
    ),
    "Padding counted in routing statistics by layers that are not recomputed": (
        "fuzz_layouts/test_fuzz_layouts.py::test_a_layout_that_was_wrong_once",
    ),
    "Sequence parallelism left off after generation": (
        "rollout/test_decoding_mode.py::test_switched_off_everywhere_and_restored_after_an_exception",
        "rollout/test_decoding_mode.py::test_a_failing_rollout_leaves_a_model_that_trains",
    ),
    # Checkpoints
    "A tied checkpoint whose own head differs from the embedding, replaced by it": (
        "model/test_weight_files.py::test_a_tied_model_s_own_head_is_kept",
    ),
    "Two sets of weights in one directory, or a tensor in two shards: one of them taken silently": (
        "model/test_weight_files.py::test_a_single_file_that_differs_from_the_shards_beside_it",
        "model/test_weight_files.py::test_a_tensor_that_differs_in_two_shards",
    ),
    "A checkpoint of the right shapes and another architecture (rotary base, query groups)": (
        "model/test_megatron_lm.py::test_another_architecture_is_refused",
    ),
    # Operation
    "A verifier that gives every answer the same reward": (
        "run/test_alarms.py::test_rewards_that_are_all_the_same",
    ),
    "Alarms that sound in every healthy run": (
        "run/test_alarms.py::test_a_healthy_run_raises_none",
        "run/test_alarms.py::test_a_mastered_task_is_no_broken_verifier",
    ),
    "A NaN that ends the run before the guard against NaN is asked": (
        "losses/test_not_finite.py::test_every_loss_leaves_its_step_out_and_goes_on",
        "faults/test_faults.py::test_weights_that_are_not_finite",
    ),
    "Interrupted rollouts sampled anew, which favours short ones": (
        # Resampling gives the same tokens, so which ones are kept cannot depend on their length.
        "rollout/test_megatron_engine.py::test_tokens_follow_from_seed_and_index_alone",
    ),
    "Every token of a rollout batch gathered on every rank, as Python objects": (
        "training/test_delivery.py::test_tokens_are_exactly_where_they_are_trained",
        "training/test_delivery.py::test_the_bytes_of_a_rank_do_not_grow_with_the_number_of_ranks",
        "training/test_delivery.py::test_the_number_of_objects_does_not_grow_with_the_number_of_tokens",
        "rollout/test_write_ahead.py::test_results_have_no_object_per_token",
    ),
    "Settings changed on resume and silently ignored; prompts skipped or repeated by another batch size": (
        "run/test_resume.py::test_changed_settings_of_the_optimizer_take_effect",
        "run/test_resume.py::test_a_run_goes_on_with_what_may_change_and_refuses_the_rest",
        "run/test_resume_classes.py::test_a_changed_key_does_what_its_class_says",
    ),
    "Ranks with other prompts, settings, tokenizers or models than the rest, training all the same": (
        "run/test_ranks_agree.py::test_whatever_differs_is_named_with_the_ranks",
        "backend/test_agreement.py::test_the_first_difference_is_named_with_values_and_ranks",
    ),
    # Untrusted and third-party input
    "A filter in front of `eval`: answers that it did not match ran code in the trainer": (
        "security/test_answers.py::test_every_verifier_but_exact_match_scores_in_the_confined_process",
        "security/test_answers.py::test_code_in_an_answer_is_not_run_and_the_next_answer_is_judged_as_ever",
    ),
    "A check of pickled metadata that the metadata could blind": (
        "security/test_checkpoint_pickles.py::test_blinded_check_does_not_run_code",
        "security/test_checkpoint_pickles.py::test_what_the_check_saw_is_what_torch_uses",
    ),
    "Files compared instead of what they mean: a tokenizer saved again, today's date in a chat template": (
        "data/test_tokenizer_meaning.py::test_a_tokenizer_that_another_release_wrote_is_the_same",
        "data/test_tokenizer_meaning.py::test_a_sentencepiece_model_and_its_conversion_are_the_same",
        "training/test_published_models.py::test_a_template_prints_the_day_of_the_first_start",
    ),
    "Ends of sequence read from only one of the files that name them": (
        "training/test_published_models.py::test_every_file_that_names_an_end_of_sequence_counts",
    ),
    "Embedding rows beyond the tokenizer sampled, or counted in a softmax": (
        "training/test_published_models.py::test_rows_beyond_the_tokenizer_take_no_part",
        "training/test_published_models.py::test_ids_beyond_the_tokenizer_decode_to_nothing",
    ),
}


@cache
def _tests_of(file):
    tree = ast.parse((HERE / file).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("bug", GUARDS)
def test_every_bug_has_its_guards(bug):
    assert GUARDS[bug], "a bug without a test"
    for guard in GUARDS[bug]:
        file, name = guard.split("::")
        assert name.startswith("test_") and name in _tests_of(file), f"{guard} does not exist"
