"""The cases of the peers' own suites, each with the test that restates it or the reason why it does not hold here.

`.venv/bin/python -m tests.conformance.cases > docs/conformance.md` prints the page. A case is a test function of a file
of a suite, whatever its parameters. Left out are cases that the peer skips, that look into its code, or whose route
only an option of the peer opens.
"""

from __future__ import annotations

LLAMA_CPP, VLLM = "llama.cpp, `tools/server/tests/unit/", "vLLM, `tests/entrypoints/openai/"
TEXT_OF_OPENAIS = "test_its_own_route_has_the_text_of_openais"
STREAM = "test_a_stream_has_the_text_of_the_reply"
FIELDS = "test_a_reply_has_openais_fields"
SCHEMA, RULES = "test_a_text_follows_its_schema", "test_a_text_follows_its_rules"
NO_GRAMMAR = "test_what_is_no_grammar_is_refused"
BOUNDS = "test_what_is_out_of_bounds_is_refused_by_its_name"
LOGPROBS, CHAT_LOGPROBS = "test_logprobs_of_a_completion_have_up_to_20_alternatives", "test_logprobs_of_a_chat"
BIAS = "test_a_bias_is_of_a_token_of_the_vocabulary"
USAGE = "test_each_chunk_has_the_numbers_of_tokens_so_far"
GAP = "test_a_gap_is_filled_as_by_the_prompt_that_clients_write_themselves"
VECTORS, ALONE = "test_openais_client_gets_a_unit_vector_for_each_text", "test_a_vector_depends_on_its_text_alone"
IDS = "test_its_own_reply_has_the_ids_of_the_tokens"
CHANCES = "test_its_own_reply_has_the_alternatives_by_their_ids"
POOLING = "An option of llama.cpp's start: this encoder has one kind of pooling."
TOO_LONG = "The error is a 400 with OpenAI's type and code, and its message has the numbers, not fields of their own."

# By the file of a suite: the cases, each with a test of `tests/`, or a sentence.
CASES: dict[str, dict[str, str]] = {
    LLAMA_CPP + "test_completion.py`": {
        "test_completion": IDS,
        "test_completion_stream": IDS,
        "test_completion_stream_vs_non_stream": "test_its_own_stream_and_chosen_fields",
        "test_completion_with_openai_library": FIELDS,
        "test_completion_stream_with_openai_library": STREAM,
        "test_completion_stream_with_openai_library_stops": "test_stop_strings_end_the_text_and_are_not_in_it",
        "test_consistent_result_same_seed": "test_a_seed_and_temperature_0_repeat_the_reply",
        "test_different_result_different_seed": "test_another_seed_gives_another_text",
        "test_consistent_result_different_batch_size": (
            "test_a_sequence_decodes_to_the_same_bits_in_a_batch_of_any_size"
        ),
        "test_nocache_long_input_prompt": "test_a_prompt_over_the_context_is_refused",
        "test_completion_with_tokens_input": "test_texts_and_tokens_mix_in_a_prompt",
        "test_completion_parallel_slots": "test_more_streams_than_the_batch_holds_all_end_as_they_would_alone",
        "test_completion_response_fields": "test_its_own_reply_has_the_prompt_and_the_settings",
        "test_n_probs": CHANCES,
        "test_n_probs_stream": CHANCES,
        "test_n_probs_post_sampling": "test_its_own_reply_has_the_probabilities_after_all_samplers",
        "test_logit_bias": "test_its_own_route_biases_texts_and_tokens",
        "test_cancel_request": "test_a_request_whose_client_disconnects_ends_and_changes_nothing",
    },
    LLAMA_CPP + "test_chat_completion.py`": {
        "test_chat_completion": FIELDS,
        "test_chat_completion_stream": STREAM,
        "test_chat_completion_with_openai_library": FIELDS,
        "test_chat_template": "An option of llama.cpp's start: the template is the base's.",
        "test_chat_template_assistant_prefill": (
            "A last message of the assistant is continued where `continue_final_message` says so, as for vLLM."
        ),
        "test_apply_chat_template": "test_a_template_is_applied_and_nothing_is_generated",
        "test_completion_with_response_format": SCHEMA,
        "test_completion_with_json_schema": SCHEMA,
        "test_completion_with_grammar": RULES,
        "test_invalid_chat_completion_req": (
            "Seven of its eight bodies are refused; two messages of the assistant in a row are answered."
        ),
        "test_chat_completion_with_timings_per_token": "test_timings_come_with_the_reply_and_with_the_last_chunk",
        "test_logprobs": CHAT_LOGPROBS,
        "test_logprobs_stream": "test_logprobs_come_with_the_chunks_of_a_stream",
        "test_logit_bias": BIAS,
        "test_context_size_exceeded": TOO_LONG,
        "test_context_size_exceeded_stream": TOO_LONG,
        "test_return_progress": "`return_progress` is ignored, and the header `X-Imprint-Ignored` names it.",
        "test_chat_completions_multiple_choices": "test_up_to_16_choices_in_order",
    },
    LLAMA_CPP + "test_tokenize.py`": {
        "test_tokenize_detokenize": "test_tokenize_with_pieces_and_back",
        "test_tokenize_with_bos": "test_bos_is_added_where_transformers_adds_it",
        "test_tokenize_with_pieces": "test_tokenize_with_pieces_and_back",
    },
    LLAMA_CPP + "test_infill.py`": {
        "test_infill_without_input_extra": GAP,
        "test_infill_with_input_extra": "test_other_texts_change_the_prompt",
        "test_invalid_input_extra_req": "test_bad_requests_name_the_field",
        "test_with_qwen_model": GAP,
    },
    LLAMA_CPP + "test_embedding.py`": {
        "test_embedding_single": VECTORS,
        "test_embedding_multiple": VECTORS,
        "test_embedding_multiple_with_fa": "test_every_part_of_a_long_text_counts",
        "test_embedding_mixed_input": (
            "Texts, token ids, objects and lists of them are taken; an empty text is a 400, as for OpenAI, and so is a"
            " list of ids with a text among them."
        ),
        "test_embedding_content_text_same_as_string": "test_objects_stand_for_their_text",
        "test_embedding_invalid_input": "test_what_cannot_be_embedded_is_refused_by_name",
        "test_embedding_pooling_mean": VECTORS,
        "test_embedding_pooling_mean_multiple": VECTORS,
        "test_embedding_pooling_none": POOLING,
        "test_embedding_pooling_none_oai": POOLING,
        "test_embedding_openai_library_single": VECTORS,
        "test_embedding_openai_library_multiple": VECTORS,
        "test_embedding_error_prompt_too_long": "test_what_cannot_be_embedded_is_refused_by_name",
        "test_same_prompt_give_same_result": ALONE,
        "test_embedding_usage_single": VECTORS,
        "test_embedding_usage_multiple": VECTORS,
        "test_embedding_openai_library_base64": VECTORS,
    },
    VLLM + "completion/test_completion.py`": {
        "test_single_completion": FIELDS,
        "test_completion_truncation_side_controls_prompt_truncation": (
            "A prompt is not cut in silence: `truncate_prompt_tokens` is a 400."
        ),
        "test_no_logprobs": CHAT_LOGPROBS,
        "test_zero_logprobs": LOGPROBS,
        "test_some_logprobs": LOGPROBS,
        "test_too_many_completion_logprobs": BOUNDS,
        "test_prompt_logprobs_completion": "test_prompt_logprobs",
        "test_completion_streaming": STREAM,
        "test_parallel_no_streaming": "test_up_to_16_choices_in_order",
        "test_parallel_streaming": STREAM,
        "test_completion_stream_options": USAGE,
        "test_batch_completions": "Prompts in lists are answered; beam search is a 400.",
        "test_echo_logprob_completion": "test_an_echo_has_the_log_probabilities_of_the_prompt",
        "test_invalid_json_schema": NO_GRAMMAR,
        "test_invalid_regex": NO_GRAMMAR,
        "test_invalid_grammar": NO_GRAMMAR,
    },
    VLLM + "chat_completion/test_chat.py`": {
        "test_no_logprobs_chat": CHAT_LOGPROBS,
        "test_zero_logprobs_chat": CHAT_LOGPROBS,
        "test_some_logprobs_chat": CHAT_LOGPROBS,
        "test_too_many_chat_logprobs": BOUNDS,
        "test_prompt_logprobs_chat": "test_prompt_logprobs",
        "test_more_than_one_prompt_logprobs_chat": "test_prompt_logprobs",
        "test_single_chat_session": FIELDS,
        "test_chat_streaming": STREAM,
        "test_chat_completion_stream_options": USAGE,
        "test_structured_outputs_choice_chat": RULES,
        "test_structured_outputs_json_chat": SCHEMA,
        "test_structured_outputs_regex_chat": RULES,
        "test_structured_outputs_type_error": NO_GRAMMAR,
        "test_structured_outputs_choice_chat_logprobs": "test_log_probabilities_are_finite_beside_a_grammar",
        "test_response_format_json_object": "test_json_mode_writes_an_object",
        "test_response_format_json_schema": SCHEMA,
        "test_response_format_text": "test_a_value_that_changes_nothing_passes_without_a_word",
        "test_extra_fields_allowed": "test_messages_that_others_wrote_come_back",
        "test_complex_message_content": "test_parts_of_text_are_the_text",
        "test_custom_role": "Roles other than OpenAI's are a 400: what they say would be learned under a guessed role.",
        "test_long_seed": BOUNDS,
        "test_invocations": "`/invocations`, a route of one cloud's containers, is not here.",
        "test_chat_completion_n_parameter_non_streaming": "test_up_to_16_choices_in_order",
        "test_chat_completion_n_parameter_streaming": STREAM,
        "test_chat_completion_n_with_seed": "test_up_to_16_choices_in_order",
        "test_chat_completion_n_equals_1": FIELDS,
    },
    VLLM + "chat_completion/test_chat_logit_bias_validation.py`": {
        "test_chat_logit_bias_valid": BIAS,
        "test_chat_logit_bias_invalid": BIAS,
        "test_chat_logit_bias_non_integer_key": BIAS,
        "test_chat_logit_bias_non_numeric_value": BIAS,
        "test_chat_logit_bias_multiple_non_integer_keys": "test_an_error_names_all_keys_that_are_no_token_ids",
    },
    VLLM + "test_tokenization.py`": {
        "test_tokenize_completions": "test_tokenize_and_detokenize_are_inverse",
        "test_tokenize_chat": "test_tokenize_counts_a_chat_as_completions_do",
        "test_tokenize_chat_with_tools": "test_the_prompt_of_a_chat_with_tools_can_be_read_and_counted",
        "test_tokenize_with_return_token_strs": "test_tokenize_and_detokenize_are_inverse",
        "test_detokenize": "test_tokenize_and_detokenize_are_inverse",
    },
}


def is_test(answer: str) -> bool:
    """Return whether a case holds, so that its entry is the name of a test."""
    return answer.startswith("test_")


def page() -> str:
    """Return the page of all cases."""
    answers = [answer for cases in CASES.values() for answer in cases.values()]
    held = sum(map(is_test, answers))
    lines = [
        "# The peers' own tests",
        "",
        "Printed by `.venv/bin/python -m tests.conformance.cases`; edit `tests/conformance/cases.py` instead.",
        "",
        f"Of {len(answers)} cases of the suites of llama.cpp and vLLM, {held} hold here, each restated by a test here,",
        f"and {len(answers) - held} do not, for the reason beside each. A case is a test function of a suite's",
        "file, whatever its parameters. Left out are cases that the peer skips, that look into its code, or whose",
        "route only an option of the peer opens. Cases that expect the words of one model are restated with what the",
        "server decides.",
    ]
    for suite, cases in CASES.items():
        kept = sum(map(is_test, cases.values()))
        lines += [
            "",
            f"## {suite.replace('`', '')}",
            "",
            f"{kept} of {len(cases)} hold.",
            "",
            "| case | here |",
            "| --- | --- |",
        ]
        lines += [f"| `{case}` | {f'`{answer}`' if is_test(answer) else answer} |" for case, answer in cases.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(page(), end="")
