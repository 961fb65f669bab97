"""Examples of the replies for /openapi.json, by the names of their schemas.

The examples of request bodies stand next to the schemas in `service/http/schemas.py`.
"""

from dataclasses import asdict
from typing import Any

from service.types import SUGGESTED_SAMPLING

Json = dict[str, Any]

HEAD: Json = {"created": 1767225600, "model": "smollm2-135m-instruct", "system_fingerprint": "fp_39fc1d5a02"}
USAGE: Json = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
ADAPTATION: Json = {"tokens_learned": 8, "rows_written": 7, "loss": 4.271, "version_from": 3, "version_to": 4}
TIMINGS: Json = {
    "cache_n": 0,
    "prompt_n": 24,
    "prompt_ms": 96.0,
    "prompt_per_token_ms": 4.0,
    "prompt_per_second": 250.0,
    "predicted_n": 3,
    "predicted_ms": 60.0,
    "predicted_per_token_ms": 20.0,
    "predicted_per_second": 50.0,
}
FINISHED_CHOICE: Json = {"index": 0, "logprobs": None, "finish_reason": "length"}
OPEN_CHOICE: Json = FINISHED_CHOICE | {"finish_reason": None}
MODEL: Json = {
    "id": "smollm2-135m-instruct",
    "object": "model",
    "created": 1767225600,
    "owned_by": "imprint",
    "fingerprints": {
        "base": "sha256:5a1395716f79…",
        "memory": "sha256:b1f6b34e040f…",
        "session": "sha256:c2e04d6b917a…",
    },
    "sampling": asdict(SUGGESTED_SAMPLING),
    "root": "smollm2-135m-instruct",
    "max_model_len": 2048,
    "meta": {"n_ctx": 2048, "n_vocab": 49152, "n_params": 134515008},
}
SESSION: Json = {
    "id": "alice",
    "object": "session",
    "version": 4,
    "model": "sha256:c2e04d6b917a…",
    "tokens_learned": 784,
    "rows": 698,
    "bytes": 54444,
    "gain": 0.0175,
    "created": 1767225600,
    "updated": 1767225660,
    "options": {"learn": "all"},
}
LOG_ENTRY: Json = {
    "version": 4,
    "kind": "learn",
    "of": None,
    "source": "src/cat.py",
    "time": 1767225660.25,
    "digest": "8f434346648f6b96",
    "tokens": 8,
    "rows": 7,
    "loss": 4.271,
    "request_id": "6f1c2b1d0f8a4c0e9a54d1d7c6f3a2b1",
    "text": None,
}
EPISODE: Json = {
    "ordinal": 12,
    "version": 4,
    "offset": 0,
    "time": 1767225660.25,
    "text": "My cat is called Miso.",
    "asks": False,
}
WHY: Json = {"why": [{"version": 3, "example": 9, "weight": 0.625}]}
ACTION: Json = {
    "object": "action",
    "action": "sports",
    "action_id": "act-4-5f2b9c04d1e7",
    "probability": 0.75,
    "probabilities": {"news": 0.25, "sports": 0.75},
    "expected": {"news": 0.375, "sports": 0.5},
    "propensity": 0.75,
    "holdout": False,
    **WHY,
}
REWARDED: Json = {"adaptation": ADAPTATION | {"tokens_learned": 1, "rows_written": 1}}
FIXED_ACTION: Json = {
    "action": 1,
    "probabilities": [0.25, 0.75],
    "expected": [0.375, 0.5],
    "propensity": None,
    "holdout": None,
    "why": None,
}
LABELLED: Json = {"label": "churn", "probabilities": {"churn": 0.75, "stay": 0.125}, "unknown": 0.125, **WHY}
VALUED: Json = {"value": 12.5, "interval": [10.0, 15.0], **WHY}
SITE: Json = {
    "name": "lexical",
    "kind": "lexical",
    "rows": 698,
    "cells": 4,
    "bin_cells": 1,
    "bin_rows": 300,
    "counts": [0, 201, 289, 208],
}
SCORED: Json = {
    "tokens": ["My", " cat"],
    "logprobs": [-5.5, -3.25],
    "frozen_logprobs": [-5.5, -7.75],
    "loss": 4.375,
    "frozen_loss": 6.625,
    "version": 4,
}


def _completion(choice: Json, **more: Any) -> Json:
    return {"id": "cmpl-1", "object": "text_completion"} | HEAD | {"choices": [choice]} | more


def _chat(kind: str, choice: Json, **more: Any) -> Json:
    return {"id": "chatcmpl-1", "object": kind} | HEAD | {"choices": [choice]} | more


CHAT_MESSAGE: Json = {"role": "assistant", "content": "Hello", "refusal": None}
ERROR_MESSAGE = "'temperature': input should be less than or equal to 100, got 101."

OLLAMA_REPLY: Json = {"model": "smollm2-135m-instruct", "created_at": "2026-01-01T00:00:00Z", "done": False}
OLLAMA_DETAILS: Json = {
    "parent_model": "",
    "format": "",
    "family": "imprint",
    "families": ["imprint"],
    "parameter_size": "134.5M",
    "quantization_level": "",
}
OLLAMA_MODEL: Json = {
    "name": "smollm2-135m-instruct",
    "model": "smollm2-135m-instruct",
    "modified_at": "2026-01-01T00:00:00Z",
    "size": 538090408,
    "digest": "5a1395716f79…",
    "details": OLLAMA_DETAILS,
}
OLLAMA_SHOWN: Json = {
    "modelfile": "",
    "parameters": "temperature 0.4\ntop_p 0.9\nfrequency_penalty 0.5",
    "template": "",
    "modified_at": "2026-01-01T00:00:00Z",
    "details": OLLAMA_DETAILS,
    "model_info": {"general.architecture": "imprint", "imprint.context_length": 2048},
    "capabilities": ["completion"],
}

MESSAGE_USAGE: Json = {
    "input_tokens": 9,
    "output_tokens": 1,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
}
STOP: Json = {"stop_reason": "max_tokens", "stop_sequence": None}
TEXT_BLOCK: Json = {"type": "text", "text": ""}
MESSAGE: Json = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "smollm2-135m-instruct",
    "content": [],
    "stop_reason": None,
    "stop_sequence": None,
    "usage": MESSAGE_USAGE,
}
MESSAGE_EVENTS: list[Json] = [
    {"type": "message_start", "message": MESSAGE | {"usage": MESSAGE_USAGE | {"output_tokens": 0}}},
    {"type": "content_block_start", "index": 0, "content_block": TEXT_BLOCK},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Hello"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": STOP, "usage": MESSAGE_USAGE, "adaptation": ADAPTATION},
    {"type": "message_stop"},
]

RESPONSE: Json = {
    "id": "resp_5f2b9c04d1e75f2b9c04d1e75f2b9c04_alice",
    "object": "response",
    "created_at": 1767225600,
    "status": "in_progress",
    "background": False,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "conversation": {"id": "alice"},
    "max_output_tokens": 32,
    "metadata": {},
    "model": "smollm2-135m-instruct",
    "output": [],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "store": True,
    "temperature": 0.4,
    "text": {"format": {"type": "text"}},
    "tool_choice": "auto",
    "tools": [],
    "top_p": 0.9,
    "truncation": "disabled",
    "usage": None,
    "adaptation": None,
}
OUTPUT_TEXT: Json = {"type": "output_text", "text": "Hello", "annotations": [], "logprobs": []}
OUTPUT_MESSAGE: Json = {
    "id": "msg_5f2b9c04d1e75f2b9c04d1e75f2b9c04.0_alice",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [OUTPUT_TEXT],
}
RESPONSE_USAGE: Json = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens": 1,
    "output_tokens_details": {"reasoning_tokens": 0},
    "total_tokens": 10,
}
COMPLETED_RESPONSE: Json = RESPONSE | {
    "status": "completed",
    "output": [OUTPUT_MESSAGE],
    "usage": RESPONSE_USAGE,
    "adaptation": ADAPTATION,
}
ITEM: Json = {"item_id": OUTPUT_MESSAGE["id"], "output_index": 0, "content_index": 0}
OPEN_MESSAGE: Json = OUTPUT_MESSAGE | {"status": "in_progress", "content": []}
RESPONSE_EVENTS: list[Json] = [
    {"type": "response.created", "sequence_number": 0, "response": RESPONSE},
    {"type": "response.in_progress", "sequence_number": 1, "response": RESPONSE},
    {"type": "response.output_item.added", "sequence_number": 2, "output_index": 0, "item": OPEN_MESSAGE},
    {"type": "response.content_part.added", "sequence_number": 3} | ITEM | {"part": OUTPUT_TEXT | {"text": ""}},
    {"type": "response.output_text.delta", "sequence_number": 4} | ITEM | {"delta": "Hello", "logprobs": []},
    {"type": "response.output_text.done", "sequence_number": 5} | ITEM | {"text": "Hello", "logprobs": []},
    {"type": "response.content_part.done", "sequence_number": 6} | ITEM | {"part": OUTPUT_TEXT},
    {"type": "response.output_item.done", "sequence_number": 7, "output_index": 0, "item": OUTPUT_MESSAGE},
    {"type": "response.completed", "sequence_number": 8, "response": COMPLETED_RESPONSE},
]

INPUT_ITEM: Json = {
    "id": "msg_5f2b9c04d1e75f2b9c04d1e75f2b9c04.i0_alice",
    "type": "message",
    "status": "completed",
    "role": "user",
    "content": [{"type": "input_text", "text": "My cat is called Miso."}],
}
ITEM_LIST: Json = {"data": [INPUT_ITEM], "first_id": INPUT_ITEM["id"], "last_id": INPUT_ITEM["id"], "has_more": False}

EXAMPLES: dict[str, list[Json]] = {
    "AnthropicError": [
        {
            "type": "error",
            "error": {"type": "invalid_request_error", "message": "'max_tokens' is required."},
            "request_id": "6f1c2b1d0f8a4c0e9a54d1d7c6f3a2b1",
        }
    ],
    "Acted": [ACTION | REWARDED, ACTION | FIXED_ACTION | REWARDED],
    "ActedList": [{"object": "list", "data": [ACTION], **REWARDED}],
    "Completion": [_completion(FINISHED_CHOICE | {"text": " fish"}, usage=USAGE, adaptation=ADAPTATION)],
    "CompletionChunk": [
        _completion(OPEN_CHOICE | {"text": " fish"}),
        _completion(FINISHED_CHOICE | {"text": ""}, adaptation=ADAPTATION),
    ],
    "ChatCompletion": [
        _chat("chat.completion", FINISHED_CHOICE | {"message": CHAT_MESSAGE}, usage=USAGE, adaptation=ADAPTATION)
    ],
    "ChatChunk": [
        _chat("chat.completion.chunk", OPEN_CHOICE | {"delta": {"content": "Hello"}}),
        _chat("chat.completion.chunk", FINISHED_CHOICE | {"delta": {}}, adaptation=ADAPTATION),
    ],
    "Conversation": [{"id": "alice", "object": "conversation", "created_at": 1767225600, "metadata": {}}],
    "ConversationDeleted": [{"id": "alice", "object": "conversation.deleted", "deleted": True}],
    "EmbeddingList": [
        {
            "object": "list",
            "data": [{"object": "embedding", "index": 0, "embedding": [0.8, -0.6]}],
            "model": "smollm2-135m-instruct",
            "system_fingerprint": "fp_39fc1d5a",
            "usage": {"prompt_tokens": 8, "total_tokens": 8},
        }
    ],
    "ErrorReply": [
        {"error": {"message": ERROR_MESSAGE, "type": "invalid_request_error", "param": "temperature", "code": None}}
    ],
    "Detokenized": [{"prompt": "My cat", "content": "My cat"}],
    "Health": [{"status": "ok"}],
    "InfillReply": [
        {
            "id": "infill-1",
            "index": 0,
            "content": "a + b",
            "tokens": [64, 488, 293],
            "completion_probabilities": None,
            "prompt": "<|fim_prefix|>def add(a, b):\n    return <|fim_suffix|>\n<|fim_middle|>",
            "generation_settings": {
                "n_predict": 16,
                "seed": None,
                "temperature": 0.0,
                "top_k": 0,
                "top_p": 1.0,
                "min_p": 0.0,
                "typical_p": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "repeat_penalty": 1.0,
                "repeat_last_n": -1,
                "ignore_eos": False,
                "stop": [],
                "n_probs": 0,
                "post_sampling_probs": False,
                "stream": False,
            },
            "model": "qwen2.5-coder-0.5b-instruct",
            "stop": True,
            "stop_type": "eos",
            "stopping_word": "",
            "tokens_predicted": 3,
            "tokens_evaluated": 24,
            "tokens_cached": 0,
            "has_new_line": False,
            "truncated": False,
            "tokens_cut": {"prefix": 0, "suffix": 0, "extra": 0},
            "timings": TIMINGS,
            "adaptation": None,
        }
    ],
    "ItemList": [{"object": "list"} | ITEM_LIST],
    "Labelled": [
        {"object": "label", **LABELLED, "version": 4},
        {"object": "label", "label": 1, "probabilities": [0.25, 0.75], "unknown": None, "why": None, "version": 4},
    ],
    "Valued": [{"object": "value", **VALUED, "version": 4}],
    "PredictedList": [{"object": "list", "data": [{"object": "label", **LABELLED}], "version": 4}],
    "ListedResult": [
        {
            "id": "fco_5f2b9c04d1e75f2b9c04d1e75f2b9c04.i2_alice",
            "type": "function_call_output",
            "status": "completed",
            "call_id": "call_1",
            "output": "It rains.",
        }
    ],
    "Live": [{"status": "ok"}],
    "MessageEvent": MESSAGE_EVENTS,
    "MessageReply": [MESSAGE | STOP | {"content": [TEXT_BLOCK | {"text": "Hello"}], "adaptation": ADAPTATION}],
    "Model": [MODEL],
    "ModelList": [{"object": "list", "data": [MODEL]}],
    "Observed": [{"tokens_learned": 8, "rows_written": 7, "loss": 4.271, "version": 4, "predictions": None}],
    "OllamaChatReply": [OLLAMA_REPLY | {"message": {"role": "assistant", "content": "Hello"}}],
    "OllamaError": [{"error": "'model' is required."}],
    "OllamaGenerateReply": [OLLAMA_REPLY | {"response": "Hello"}],
    "OllamaEmbedding": [{"embedding": [0.8, -0.6]}],
    "OllamaEmbeddings": [
        {
            "model": "smollm2-135m-instruct",
            "embeddings": [[0.8, -0.6]],
            "total_duration": 4_000_000,
            "load_duration": 0,
            "prompt_eval_count": 8,
        }
    ],
    "OllamaModels": [{"models": [OLLAMA_MODEL]}],
    "OllamaRunningModels": [
        {
            "models": [
                OLLAMA_MODEL | {"expires_at": "9999-12-31T23:59:59Z", "size_vram": 0, "context_length": 2048},
            ]
        }
    ],
    "OllamaShown": [OLLAMA_SHOWN],
    "OllamaVersion": [{"version": "0.6.4"}],
    "PolicyList": [{"object": "list", "data": []}],
    "Ready": [{"status": "ready"}],
    "Rendered": [{"prompt": "<|im_start|>user\nHello.<|im_end|>\n<|im_start|>assistant\n"}],
    "ResponseDeleted": [{"id": RESPONSE["id"], "object": "response", "deleted": True}],
    "ResponseEvent": RESPONSE_EVENTS,
    "ResponseReply": [COMPLETED_RESPONSE],
    "Scored": [SCORED],
    "Session": [SESSION],
    "SessionCells": [{"object": "session.cells", "version": 4, "sites": [SITE]}],
    "SessionDeleted": [{"id": "alice", "object": "session", "deleted": True}],
    "SessionDiff": [
        {
            "object": "session.diff",
            "from": 3,
            "to": 4,
            "tokens_learned": 8,
            "rows": {"lexical": {"added": 7, "removed": 0, "changed": 0}},
            "learned": [LOG_ENTRY],
            "forgotten": [],
        }
    ],
    "SessionEpisodes": [{"object": "list", "data": [EPISODE], "has_more": True, "next": 12}],
    "SessionList": [{"object": "list", "data": [SESSION], "has_more": True, "next": "alice"}],
    "SessionLog": [{"object": "list", "data": [LOG_ENTRY], "has_more": True, "next": 4}],
    "TokenCount": [{"input_tokens": 9}],
    "Tokenized": [{"count": 2, "max_model_len": 2048, "tokens": [4, 7], "token_strs": None}],
    "Version": [{"version": "0.1.0"}],
}
