"""What users asked of custom backward rules with network modules, and the test that shows each answer.

Thirty needs, from issue and pull-request threads. The tests reproduce the shape of the thread in every
framework that it concerns. What a backward-rule library can't answer, or not yet, says so here.

| row | need | thread | shown by |
|---|---|---|---|
| 1 | a rule over a module that returns parameter cotangents, in Haiku | dm-haiku#78 | |
| | | | test_the_documented_example_signs_the_parameters_gradient_and_leaves_the_inputs_alone |
| | | | test_the_example_gives_the_same_when_its_functions_run_late |
| 2 | the same eager and staged, with keys and state inside, in Haiku | dm-haiku#176 | |
| | | | test_row_2_haiku_keys_state_and_modules_in_the_body_are_the_same_eager_and_staged |
| | | | test_row_2_haiku_keys_and_state_in_the_body_under_scan |
| | | | test_a_wrapped_block_is_the_unwrapped_one |
| | | | test_haiku_custom_getters_interceptors_and_policies_reach_late_runs |
| 3 | lifted parameters inside a scan, names kept, in Haiku | dm-haiku#352 | |
| | | | test_row_3_parameters_lifted_outside_of_a_scan_are_used_inside_it_under_their_names |
| | | | test_haiku_lifted_parameters |
| | | | test_haiku |
| | | | out of reach: lifting, which creates parameters, in the body of `hk.scan` is Haiku's own error |
| 4 | composites, or several modules in one call | flax#1907, #3348 | |
| | | | test_linen_two_modules_in_one_call |
| | | | test_linen_a_module_that_holds_modules |
| | | | test_linen_sequential |
| | | | test_linen_a_module_as_an_argument |
| | | | test_nnx_two_modules_and_shared_variables |
| | | | test_row_15_another_module_may_be_an_input |
| | | | test_haiku_two_modules_in_one_call |
| | | | test_haiku_a_module_that_holds_modules |
| | | | test_haiku_a_module_as_an_argument |
| | | | test_equinox_shared_layers_and_two_modules |
| 5 | tied weights | flax#1907, #2864 | |
| | | | test_row_5_tied_weights_are_one_leaf_with_one_summed_cotangent |
| | | | test_linen_one_module_twice_in_one_handle_has_one_summed_cotangent |
| | | | test_linen_a_module_called_twice |
| 6 | where parameter cotangents go, in what order and container | flax#1907, #3504 | |
| | | | test_row_6_parameter_cotangents_may_come_in_every_container_of_the_framework |
| | | | test_cotangents_are_forgiven_their_containers_and_dtypes |
| | | | test_the_other_order_is_recognised_and_both_remedies_are_named |
| | | | test_code_written_for_todays_flax_runs_with_variables_first |
| | | | test_todays_flax_signs_the_inputs_gradient_in_the_documented_example |
| 7 | cotangents of several losses to different parameters | dm-haiku#98, flax#1907 | |
| | | | test_row_7_the_cotangents_of_several_losses_go_to_different_parameters |
| 8 | gradients with respect to and through state | jax#844, an NNX commit | |
| | | | test_row_8_a_gradient_through_the_state_that_a_call_wrote_arrives |
| | | | test_row_8_a_rule_on_the_output_leaves_the_gradient_through_written_state_alone |
| | | | test_row_8_a_rule_that_asks_for_it_gets_the_cotangent_of_the_state_and_answers_for_it |
| | | | test_a_gradient_through_mutated_state_arrives |
| | | | test_state_is_chosen_beside_the_parameters |
| | | | test_haiku_state_is_chosen_beside_the_parameters |
| 9 | statistics recorded in the forward function | flax#4651, #4847 | |
| | | | test_row_9_a_statistic_recorded_in_the_forward_function_is_there_once_after_the_call |
| | | | test_row_9_a_statistic_that_fn_does_not_record_is_an_error_under_jit |
| | | | test_nnx_updates_reach_the_live_module_in_both_modes |
| | | | test_a_wrapped_block_is_the_unwrapped_one |
| 10 | weights or state updated by the backward pass | flax#4301, jax#39438 | |
| | | | test_row_10_the_gradient_of_a_state_may_be_its_new_value |
| | | | test_row_10_a_mutable_array_is_written_to_in_the_backward_pass |
| | | | out of reach: writing a framework's state there; a channel out of the backward pass is a later part |
| 11 | one signature of the backward function, whatever the mode of NNX | flax#4265, #4301, #5452 | |
| | | | test_the_documented_example_signs_the_parameters_gradient_and_leaves_the_inputs_alone |
| | | | test_the_pullback_is_a_residual_that_may_be_called_again |
| | | | test_rows_11_and_19_none_stands_for_any_cotangent_in_every_framework |
| 12 | a frozen module, with a gradient of its input alone | flax#4636 | |
| | | | test_row_12_a_frozen_module_has_a_gradient_of_its_input_alone |
| 13 | keyword and keyword-only arguments, and names | jax#13302, #1938 | |
| | | | test_row_13_keyword_arguments_reach_the_function_and_have_a_gradient |
| | | | test_row_13_arguments_without_gradient_are_named_as_well_as_numbered |
| | | | test_keyword_and_keyword_only_arguments_are_never_lost |
| 14 | methods as rules | jax#2483, jaxopt#209 | |
| | | | test_row_14_a_rule_decorates_a_method |
| | | | test_row_14_a_rule_decorates_a_method_of_a_plain_pytree |
| | | | test_row_14_a_method_in_the_form_of_jax_custom_vjp |
| | | | test_row_14_where_modules_are_references_that_form_says_which_one_to_use |
| | | | test_linen_a_bound_method |
| | | | test_nnx_a_bound_method |
| 15 | closing over parameters | jax#2520, #5440, diffrax#135 | |
| | | | test_row_15_a_differentiated_value_that_the_function_closes_over_is_named |
| | | | test_row_15_a_differentiated_module_that_the_function_closes_over_is_named |
| | | | test_row_15_a_value_that_is_not_differentiated_may_be_closed_over |
| | | | test_row_15_what_the_error_says_to_do_gives_the_gradient |
| | | | test_row_15_another_module_may_be_an_input |
| | | | test_haiku_a_function_that_reaches_modules_the_handle_does_not_hold |
| 16 | "static" and "not differentiated" apart | jax#12982, #20889 | |
| | | | test_row_16_an_array_without_gradient_may_be_traced_and_a_static_argument_stays_one |
| | | | test_arguments_without_gradient_come_first_and_get_none |
| 17 | knowing what needs a gradient | jax#11208, #14960 | |
| | | | test_row_17_a_rule_knows_what_needs_a_gradient |
| | | | test_row_17_what_has_no_gradient_is_not_perturbed |
| 18 | jvp, linearize, hessian through a rule | jax#3996, #16049 | |
| | | | test_row_18_the_hessian_of_a_rule_is_the_derivative_of_its_backward_pass |
| | | | test_row_18_a_rule_that_changes_the_gradient_changes_the_hessian_with_it |
| | | | test_row_18_forward_mode_through_a_rule_is_an_error_and_not_the_derivative_of_another_function |
| | | | test_second_order_differentiates_the_rule |
| | | | out of reach: forward mode at first order, of which JAX has none beside a custom backward pass |
| 19 | integer, key, None and float0 | jax#4595, #8356, #18931 | |
| | | | test_rows_19_and_29_arguments_and_outputs_of_every_kind_pass |
| | | | test_row_19_whatever_a_rule_gives_for_an_integer_its_gradient_is_none |
| | | | test_rows_11_and_19_none_stands_for_any_cotangent_in_every_framework |
| | | | test_arguments_and_outputs_of_every_kind_pass_through |
| 20 | a cotangent of another dtype | jax#27144 | |
| | | | test_row_20_a_cotangent_of_another_dtype_is_cast_to_that_of_its_parameter |
| | | | test_a_cotangent_is_cast_to_its_primals_dtype |
| 21 | remat that does not run the forward function twice | jax#21303 | |
| | | | test_row_21_remat_does_not_run_the_forward_function_twice_if_asked |
| | | | test_row_21_optimised_remat_changes_nothing_without_remat |
| 22 | who reduces the cotangent of weights in shard_map | jax#21855 | |
| | | | test_the_gradient_of_a_sharded_loss_is_the_unsharded_gradient |
| | | | test_a_gradient_taken_inside_is_the_unsharded_gradient |
| | | | test_with_check_vma_a_hand_written_rule_must_sum_over_shards |
| | | | test_without_check_vma_a_hand_written_rule_must_not_sum_over_shards |
| 23 | metrics out of the backward pass | jax#1197, #5131, diffrax#110 | |
| | | | test_row_23_metrics_leave_the_backward_pass_as_the_gradient_of_an_input_that_nothing_uses |
| | | | test_row_23_metrics_of_every_step_of_a_scan_add_up_in_the_sink |
| | | | out of reach: into a framework's state; a channel out of the backward pass is a later part |
| 24 | a rule on every dense layer of a model that is not edited | flax#1436, dm-haiku#289 | |
| | | | test_row_24_a_rule_on_every_dense_layer_acts_once_on_each_and_on_nothing_else |
| | | | test_row_24_the_output_is_the_unedited_models |
| | | | out of reach: by type or path in one call; a public `attach` is a later part |
| 25 | one rule in two module systems | maxtext#2242, #3849 | |
| | | | test_the_documented_example_signs_the_parameters_gradient_and_leaves_the_inputs_alone |
| | | | test_the_contract_holds |
| | | | test_a_wrapped_block_is_the_unwrapped_one |
| 26 | what belongs to the whole batch, in the backward pass under vmap | jax#22993, #2930 | |
| | | | test_row_26_a_batch_inside_the_rule_is_one_call_of_the_backward_pass |
| | | | test_row_26_outside_of_the_rule_each_example_has_a_call_of_its_own |
| | | | out of reach: with the vmap outside of the rule, where JAX has no whole batch to show |
| 27 | a backward pass that runs for a cotangent of zeros | jax#6523 | |
| | | | test_row_27_a_backward_pass_runs_for_a_cotangent_of_zeros_and_may_regularise |
| | | | test_the_rule_is_not_run_for_an_output_that_nothing_depends_on |
| 28 | an omitted cotangent that silently stops the layers above | jax#17496 | |
| | | | test_row_28_a_rule_that_speaks_of_the_parameters_alone_leaves_the_layers_above_their_gradient |
| | | | test_too_few_cotangents_say_how_many_are_expected |
| | | | test_a_cotangent_that_lacks_a_leaf_names_it |
| | | | out of reach: refusing a None that is written out, which is a zero, as in JAX |
| 29 | leaves, outputs and residuals that are no arrays | equinox#962, jax#10366 | |
| | | | test_rows_19_and_29_arguments_and_outputs_of_every_kind_pass |
| | | | test_row_29_residuals_of_every_kind_reach_the_backward_pass |
| | | | test_row_29_plain_parameters_beside_functions_and_text_have_a_gradient |
| | | | test_equinox |
| 30 | an implicit layer or an ODE around a module | flax#2887, diffrax#115 | |
| | | | test_row_30_an_implicit_layer_has_the_gradient_of_its_fixed_point |
| | | | test_row_30_an_implicit_layer_creates_its_parameters |
| | | | test_row_30_a_network_under_a_rule_is_the_right_hand_side_of_an_ode |
"""

from __future__ import annotations

import ast
import pathlib
import re

import pytest

TABLE = __doc__ or ""
TESTS = pathlib.Path(__file__).parent
ROWS = range(1, 31)


def collected() -> dict[str, set[int]]:
    """Lists the tests of this folder, each with the rows that its name speaks of."""
    found = {}
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        found |= {name: rows_in(name) for name in names if name.startswith("test_")}
    return found


def rows_in(name: str) -> set[int]:
    """Reads `test_row_5_...` and `test_rows_19_and_29_...`."""
    match = re.match(r"test_rows?_((?:\d+_)(?:and_\d+_)*)", name)
    return set(map(int, re.findall(r"\d+", match[1]))) if match else set()


def read(table: str) -> list[tuple[int, list[str]]]:
    """Lists the rows of a table, each with what shows it."""
    rows: list[tuple[int, list[str]]] = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if len(cells) != 4 or cells[0] in ("row", "---"):
            continue
        if cells[0]:
            assert cells[1], f"row {cells[0]} names no need"
            assert cells[2], f"row {cells[0]} names no thread"
            rows.append((int(cells[0]), []))
        if cells[3]:
            rows[-1][1].append(cells[3])
    return rows


def check(table: str) -> None:
    """Refuses a table that leaves out a row, has one twice, or names a test that does not exist."""
    rows, tests = read(table), collected()
    assert [number for number, _ in rows] == list(ROWS), "every row occurs once, in order"
    for number, shown in rows:
        assert shown, f"row {number} has neither a test nor a reason"
        for entry in shown:
            assert entry in tests or entry.startswith("out of reach: "), f"row {number} names {entry}, which is no test"
        assert len(set(shown)) == len(shown), f"row {number} names a test twice"
    named = {number: set(shown) for number, shown in rows}
    for name, speaks_of in tests.items():
        for number in speaks_of:
            assert name in named[number], f"row {number} does not name {name}"


def test_every_need_has_a_test_or_a_reason_why_it_is_out_of_reach():
    check(TABLE)


NAME = "test_row_7_the_cotangents_of_several_losses_go_to_different_parameters"
ROW = f"| 7 | cotangents of several losses to different parameters | dm-haiku#98, flax#1907 | |\n| | | | {NAME} |\n"
WRONG = {
    "misspelt": (NAME, NAME + "s", "row 7 names test_row_7_.*parameterss, which is no test"),
    "left out": (ROW, "", "every row occurs once, in order"),
    "twice": (ROW, ROW + ROW, "every row occurs once, in order"),
    "empty": (f"| | | | {NAME} |\n", "", "row 7 has neither a test nor a reason"),
    "without a thread": ("| dm-haiku#98, flax#1907 |", "| |", "row 7 names no thread"),
    "of another row": (NAME, "test_row_12_a_frozen_module_has_a_gradient_of_its_input_alone", f"row 7 .* name {NAME}"),
    "named twice": (f"| | | | {NAME} |\n", f"| | | | {NAME} |\n" * 2, "row 7 names a test twice"),
}


@pytest.mark.parametrize(("part", "replacement", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_table_is_refused(part, replacement, message):
    assert TABLE.count(part) == 1
    with pytest.raises(AssertionError, match=message):
        check(TABLE.replace(part, replacement))


def test_the_rows_in_a_name_are_read():
    assert rows_in("test_row_5_tied_weights") == {5}
    assert rows_in("test_rows_19_and_29_arguments") == {19, 29}
    assert rows_in("test_a_row_of_5_parameters") == set()
