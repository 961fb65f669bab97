"""The fields of other servers' interfaces that completions meet and this server does not honour.

Fields that would change an answer are refused unless their value changes nothing: `UNSUPPORTED` has those values by the
names of the fields, and `INSTEAD` what replaces a field. `HINTS` change no answer: they are ignored, and the header
`X-Imprint-Ignored` names them. OpenAI, vLLM, llama.cpp, Ollama and OpenRouter document these names.
"""

from typing import Any

UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    # what the answer may be
    "structural_tag": (),
    "format": ("",),
    "bad_words": ([],),
    "allowed_token_ids": ([],),
    "logits_processors": ([],),
    # other ways to draw a token
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "top_n_sigma": (0, -1),
    "top_a": (0,),
    "tfs_z": (1,),
    "samplers": (),
    # what the prompt and the text are made of
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "return_tokens_as_token_ids": (False,),
    "return_token_ids": (False,),
    "return_tokens": (False,),
    "post_sampling_probs": (False,),
    "prompt_embeds": (),
    "image_data": ([],),
    "lora": ([],),
    "options": ({},),
}
COMPLETION_UNSUPPORTED = UNSUPPORTED | {
    "messages": (),
    "max_completion_tokens": (),
    "add_special_tokens": (True,),
}
CHAT_UNSUPPORTED = UNSUPPORTED | {
    "prompt": (),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "t_max_predict_ms": (0, -1),
    "n_indent": (0,),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "web_search_options": (),
    "moderation": (),
    "chat_template": (),
    "documents": ([],),
    "add_special_tokens": (False,),
}
INSTEAD = {"functions": "tools", "function_call": "tool_choice"}
HINTS = frozenset(
    {
        *("metadata", "moderation_options", "prediction", "prompt_cache_key"),
        *("prompt_cache_options", "prompt_cache_retention", "reasoning_effort", "safety_identifier", "service_tier"),
        *("store", "verbosity"),
        *("cache_salt", "chat_template_kwargs", "include_reasoning", "priority", "request_id"),
        "spaces_between_special_tokens",
        *("cache_prompt", "dry_allowed_length", "dry_base", "dry_penalty_last_n", "dry_sequence_breakers"),
        *("dynatemp_exponent", "id_slot", "min_keep", "mirostat_eta", "mirostat_tau", "n_keep", "penalize_nl"),
        *("reasoning_format", "return_progress", "timings_per_token", "xtc_threshold"),
        *("n_cache_reuse", "t_max_prompt_ms"),
        *("keep_alive", "think"),
        *("models", "plugins", "provider", "reasoning", "route", "transforms", "usage"),
    }
)
