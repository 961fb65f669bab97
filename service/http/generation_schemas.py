"""The bodies of completions and chat completions: OpenAI's fields, samplers by vLLM's and llama.cpp's names, and
Imprint's own.

Clients of these interfaces send fields of many servers. A field that changes no answer is ignored and named
(`ignored`); a field that would change the answer and cannot be honoured is refused, and so is a name that looks like a
misspelt field of this server: nobody should learn by a typing error (`service/http/foreign_fields.py` has the tables).
"""

import difflib
import re
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from model.text.grammar import GrammarSource
from service.errors import BadRequest
from service.http import field_rules
from service.http.faults import shorten
from service.http.foreign_fields import CHAT_UNSUPPORTED, COMPLETION_UNSUPPORTED, HINTS, INSTEAD, UNSUPPORTED
from service.http.schemas import (
    ADAPT,
    INT32,
    LEARN,
    LEARN_TOOL_RESULTS,
    MAX_CHOICES,
    MAX_MESSAGES,
    MODEL_NAME,
    ON_DISCONNECT,
    RECALL,
    SESSION,
    WHOLE,
    Body,
    Message,
    OnDisconnect,
    Seed,
    SessionId,
    Text,
    TextOrParts,
    TextPart,
    TokenIds,
    limit_entries,
    text_or_list,
)
from service.http.structured_output import FIELDS, grammar_of
from service.http.tool_schemas import OfferedTools, ToolChoice, Tools, offered_tools, require_calls
from service.types import AdaptMode, LearnMode

MAX_BIASES = 1024
MAX_PROMPTS = 128
TOKEN_ID = "^[0-9]{1,10}$"  # as a key
MAX_STOPS = 32
MAX_STOP_CHARS = 1024
MAX_LOGPROBS_TOP = 20
MAX_NAME_CHARS = 40  # of a name that may be a misspelt field
OWN_FIELDS = ("session", "adapt", "learn", "recall", "on_disconnect")

# The tags of unions stand in angle brackets, so that `explain` can remove them from the location of an error.


def _part_kind(value: Any) -> str:
    return "<text>" if isinstance(value, str) else "<token>"


def _one_prompt_kind(value: Any) -> str | None:
    """Return the kind of one prompt: a list with both texts and token ids is one prompt of parts."""
    if not isinstance(value, list):
        return "<text>" if isinstance(value, str) else None
    return "<parts>" if str in set(map(type, value)) else "<tokens>"


def _prompt_kind(value: Any) -> str | None:
    if not isinstance(value, list):
        return _one_prompt_kind(value)
    kinds = set(map(type, value))
    if str in kinds and kinds & {int, float}:
        return "<parts>"
    return (
        {str: "<list>", list: "<list>", int: "<tokens>", float: "<tokens>"}.get(type(value[0])) if value else "<list>"
    )


def _not_zero(value: int) -> int:
    if value == 0:
        raise PydanticCustomError("zero", "should be at least 1, or -1 for as many as fit")
    return value


def _ids_as_keys(value: Any) -> Any:
    """Refuse an object with several keys that are no token ids by an error that names them all, up to `MAX_STOPS`."""
    limit_entries(value, MAX_BIASES)
    wrong = [key for key in value if not re.fullmatch(TOKEN_ID, str(key))] if isinstance(value, dict) else []
    if len(wrong) > 1:
        names = ", ".join(shorten(key) for key in wrong[:MAX_STOPS]) + (", …" if len(wrong) > MAX_STOPS else "")
        raise PydanticCustomError("keys", "keys should be token ids, not {names}", {"names": names})
    return value


PromptPart = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[int, Field(ge=0, le=INT32), WHOLE, Tag("<token>")],
    Discriminator(_part_kind),
]
_WITH_TEXT: dict[str, Any] = {"contains": {"type": "string"}}
_WITH_BOTH: dict[str, Any] = {"allOf": [_WITH_TEXT, {"contains": {"type": "integer"}}]}
_PROMPT_ERROR = "should be a string or a list of strings, of token ids or of lists of token ids"
OnePrompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[PromptPart], Field(fail_fast=True, json_schema_extra=_WITH_TEXT), Tag("<parts>")],
    Discriminator(_one_prompt_kind, custom_error_type="prompt_type", custom_error_message=_PROMPT_ERROR),
]
Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[PromptPart], Field(fail_fast=True, json_schema_extra=_WITH_BOTH), Tag("<parts>")]
    | Annotated[list[OnePrompt], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True), Tag("<list>")],
    Discriminator(_prompt_kind, custom_error_type="prompt_type", custom_error_message=_PROMPT_ERROR),
]
SinglePrompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[list[PromptPart], Field(fail_fast=True, json_schema_extra=_WITH_BOTH), Tag("<parts>")],
    Discriminator(
        lambda value: kind if (kind := _prompt_kind(value)) != "<list>" else None,
        custom_error_type="prompt_type",
        custom_error_message="should be one prompt: a string, or a list of token ids, with strings between them or not",
    ),
]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")]
    | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True), Tag("<list>")],
    Discriminator(
        text_or_list,
        custom_error_type="stop_type",
        custom_error_message="should be a string or a list of strings",
    ),
]
LogitBias = Annotated[
    dict[
        Annotated[str, StringConstraints(pattern=TOKEN_ID)],
        Annotated[float, Field(ge=-100, le=100)],
    ],
    Field(json_schema_extra={"additionalProperties": False, "maxProperties": MAX_BIASES}),
    BeforeValidator(_ids_as_keys),
]
Count = Annotated[int, Field(ge=0, le=INT32), WHOLE]
StopTokenIds = Annotated[list[Count], Field(max_length=MAX_STOPS, fail_fast=True)]
UpTo = Annotated[int, Field(ge=-1, le=INT32), WHOLE]  # -1: as many as fit
ChatUpTo = Annotated[UpTo, AfterValidator(_not_zero), Field(json_schema_extra={"not": {"const": 0}})]
RepetitionPenalty = Annotated[float, Field(gt=0, le=10)]
Alternatives = Annotated[int, Field(ge=0, le=MAX_LOGPROBS_TOP), WHOLE]


class StreamOptions(Body):
    """The options of a stream. What changes no text is ignored."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="A hint; ignored.")
    continuous_usage_stats: bool | None = Field(
        None, description="With `include_usage`: each chunk has the numbers of tokens so far, of its choice."
    )


class ChatTextPart(TextPart):
    """A part of a message's content; unknown fields, such as marks for caches, are ignored."""

    model_config = ConfigDict(extra="allow")


class ChatMessage(Message):
    """A message of a chat completion; unknown fields, which other servers put into their replies, are ignored."""

    model_config = ConfigDict(extra="allow")

    content: TextOrParts[ChatTextPart] | None = Field(None, validate_default=True)  # type: ignore[assignment]  # a list that is only read


def _described(example: dict[str, Any], rules: Mapping[str, Any], unsupported: Mapping[str, tuple[Any, ...]]) -> Any:
    """Return what the JSON Schema of a body says besides its fields."""

    def extend(schema: dict[str, Any]) -> None:
        schema.update({"examples": [example], **rules})
        for name in HINTS:
            schema["properties"][name] = {"description": "A hint; ignored."}
        for name, values in unsupported.items():
            note = "Not supported: only values that change nothing are accepted."
            schema["properties"][name] = {"enum": [None, *values], "description": note}

    return extend


class Samplers(Body):
    """The fields that say how a token is drawn, besides temperature and top-p, and what ends the text."""

    top_k: Annotated[int, Field(ge=-1, le=INT32), WHOLE] | None = Field(
        None, description="Draw from the `top_k` likeliest tokens only; 0 and -1: from all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Draw no token that is less than `min_p` times as likely as the likeliest one."
    )
    typical_p: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="Draw from the tokens of typical surprise that have this share of the probability."
    )
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: StopTokenIds | None = Field(
        None, description="Token ids that end the text, as its end does; they are not in the text."
    )
    min_tokens: Count | None = Field(
        None, description="Tokens before which no end of text and no stop string ends the text."
    )
    ignore_eos: bool | None = Field(None, description="The text never ends by itself: no end of text is drawn.")
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: RepetitionPenalty | None = Field(
        None, description="Divides the positive scores of tokens of the prompt and the text, multiplies the others."
    )
    repeat_penalty: RepetitionPenalty | None = Field(None, description="llama.cpp's name of `repetition_penalty`.")
    repeat_last_n: Annotated[int, Field(ge=-1, le=INT32), WHOLE] | None = Field(
        None,
        description="The last tokens that the penalty looks at; -1: all. Default: 64 for `repeat_penalty`, else all.",
    )
    logit_bias: LogitBias | None = None


class GenerationRequest(Samplers):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(extra="allow")
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    model: str | None = MODEL_NAME
    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None,
        description="Default: 1; in chats the temperature that `sampling` of the model suggests, with its `top_p` and"
        " `frequency_penalty` where the request has none.",
    )
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n_predict: UpTo | None = Field(None, description="llama.cpp's name of `max_tokens`.")
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = None
    response_format: dict[str, Any] | None = Field(
        None, description="OpenAI's `text`, `json_object` or `json_schema`: the form that the text must have."
    )
    structured_outputs: dict[str, Any] | None = Field(None, description="vLLM's `json`, `regex`, `choice`, `grammar`.")
    guided_json: Annotated[Any, WithJsonSchema({"type": ["object", "string", "null"]})] = Field(
        None, description="vLLM's older name of a JSON Schema."
    )
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    grammar: str | None = Field(None, description="llama.cpp's rules (GBNF), or Lark's.")
    json_schema: dict[str, Any] | None = Field(None, description="llama.cpp's name of a JSON Schema.")
    prompt_logprobs: Alternatives | None = Field(
        None,
        description="Return the log-probabilities of the prompt's tokens, with the memory and without, and this many"
        " alternatives for each.",
    )
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(
        None, description="Names the session only where the server's setting `IMPRINT_USER_SESSIONS` says so."
    )
    session: SessionId | None = SESSION
    adapt: AdaptMode | None = ADAPT
    learn: LearnMode | None = LEARN
    recall: bool | None = RECALL
    on_disconnect: OnDisconnect | None = ON_DISCONNECT

    @model_validator(mode="after")
    def _combinations(self) -> "GenerationRequest":
        """Refuse fields of other servers that cannot be honoured, misspelt fields, and fields that need another."""
        for name, value in (self.model_extra or {}).items():
            self._check_foreign(name, value)
        if self.stream_options is not None and not self.stream:
            raise BadRequest("'stream_options' is only allowed with 'stream': true.", param="stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise BadRequest("'prompt_logprobs' is only allowed without 'stream': true.", param="prompt_logprobs")
        for name, other in (("repeat_penalty", "repetition_penalty"), ("n_predict", "max_tokens")):
            if getattr(self, name) is not None and getattr(self, other) is not None:
                raise BadRequest(f"Give {other!r} or {name!r}, not two of them.", param=name)
        if self.ignore_eos or self.min_tokens:
            name = "ignore_eos" if self.ignore_eos else "min_tokens"
            if (found := self.form) is not None:
                raise BadRequest(f"'{name}' does not go with {found[1]!r}, whose text ends by itself.", param=name)
        return self

    @property
    def form(self) -> tuple[GrammarSource, str] | None:
        """Return the grammar that the text must follow, and the field that has it. Raises BadRequest."""
        given = {name: value for name in FIELDS if (value := getattr(self, name)) not in (None, "")}
        return grammar_of(given) if given else None

    def _check_foreign(self, name: str, value: Any) -> None:
        if name in self.unsupported:
            values = self.unsupported[name]
            if value is not None and not any(_equal(value, each) for each in values):
                advice = f"; use '{INSTEAD[name]}'" if name in INSTEAD else ""
                message = f"'{name}' is not supported by this server{advice}, got {shorten(value)}."
                raise BadRequest(message, param=name)
        elif name not in HINTS and (meant := _misspelt(name, tuple(type(self).model_fields))) is not None:
            raise BadRequest(f"Unknown field '{name}'; did you mean '{meant}'?", param=name)

    @property
    def ignored(self) -> list[str]:
        """Return the names of the fields that have no effect and might have been meant to have one."""
        extra = self.model_extra or {}
        names = [name for name, value in extra.items() if value and name not in self.unsupported]
        obfuscated = self.stream_options is not None and self.stream_options.include_obfuscation
        return names + (["stream_options.include_obfuscation"] if obfuscated else [])

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = COMPLETION_UNSUPPORTED
    model_config = ConfigDict(
        json_schema_extra=_described(
            {
                "model": "smollm2-135m-instruct",
                "prompt": "My cat is called Miso. She likes",
                "max_tokens": 16,
                "session": "alice",
                "learn": "prompt",
            },
            field_rules.COMPLETION,
            COMPLETION_UNSUPPORTED,
        )
    )

    prompt: Prompt
    suffix: Text | None = Field(
        None,
        description="The text after the gap that the completion fills; for bases with tokens for that. Such a request"
        " only predicts unless it says `adapt`, and its default `temperature` is 0.",
    )
    n_indent: Count | None = Field(
        None, description="The text ends before a line, other than its first, that begins with less white space."
    )
    t_max_predict_ms: Annotated[int, Field(ge=-1, le=INT32), WHOLE] | None = Field(
        None,
        description="Milliseconds from its first token after which a text of more than one line ends; 0 and -1: none.",
    )
    max_tokens: UpTo | None = Field(
        None, description="Default: 16, as for OpenAI; -1, or more than the context has room for: as many as fit."
    )
    echo: bool | None = None
    logprobs: Alternatives | None = None
    n_probs: Alternatives | None = Field(None, description="llama.cpp's name of `logprobs`; 0: none.")
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES), WHOLE] | None = Field(
        None, description="Generate this many and return the `n` of the highest log-probability per token."
    )

    @model_validator(mode="after")
    def _rules_of_texts(self) -> "CompletionRequest":
        n = self.n or 1
        if self.best_of is not None and self.best_of < n:
            raise BadRequest(f"'best_of' must be at least 'n' ({n}), got {self.best_of}.", param="best_of")
        if self.best_of is not None and self.best_of > n and self.stream:
            raise BadRequest(f"'best_of' must equal 'n' ({n}) in a stream, got {self.best_of}.", param="best_of")
        if self.n_probs and self.logprobs is not None:
            raise BadRequest("Give 'logprobs' or 'n_probs', not two of them.", param="n_probs")
        if self.suffix and not isinstance(self.prompt, str):
            raise BadRequest("'suffix' needs a 'prompt' that is one text.", param="suffix")
        if self.suffix and self.echo:
            raise BadRequest("'echo' is not allowed with 'suffix'.", param="echo")
        return self


class ChatCompletionRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = CHAT_UNSUPPORTED
    model_config = ConfigDict(
        json_schema_extra=_described(
            {
                "model": "smollm2-135m-instruct",
                "messages": [{"role": "user", "content": "My cat is called Miso. Say hello to her."}],
                "max_completion_tokens": 32,
                "session": "alice",
                "stream": True,
            },
            field_rules.CHAT,
            CHAT_UNSUPPORTED,
        )
    )

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: ChatUpTo | None = Field(None, description="Default, -1 and more than fit: as many as fit.")
    max_completion_tokens: ChatUpTo | None = Field(None, description="OpenAI's newer name of `max_tokens`.")
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Tools | None = Field(
        None,
        description="Tools; never learned. The prompt has those that `tool_choice` lets the reply call.",
    )
    tool_choice: ToolChoice = Field(
        None,
        description="`none`; `auto`; `required`: at least one call; a tool by its name; or `allowed_tools`. Default:"
        " `auto`.",
    )
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call. Default: true.")
    learn_tool_results: bool | None = LEARN_TOOL_RESULTS
    add_generation_prompt: bool | None = Field(
        None, description="False: the prompt ends with the last message, and no turn of the assistant begins."
    )
    continue_final_message: bool | None = Field(
        None, description="True: the reply continues the last message, which is the assistant's."
    )

    @model_validator(mode="after")
    def _rules_of_chats(self) -> "ChatCompletionRequest":
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise BadRequest("Give 'max_completion_tokens' or 'max_tokens', not two of them.", param="max_tokens")
        if self.max_completion_tokens is not None and self.n_predict is not None:
            raise BadRequest("Give 'max_completion_tokens' or 'n_predict', not two of them.", param="n_predict")
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("'top_logprobs' is only allowed with 'logprobs': true.", param="top_logprobs")
        if self.continue_final_message and self.add_generation_prompt:
            message = "'continue_final_message' is only allowed with 'add_generation_prompt': false."
            raise BadRequest(message, param="continue_final_message")
        if self.continue_final_message and self.messages[-1].role != "assistant":
            message = f"'continue_final_message' needs a last message of the assistant, got {self.messages[-1].role!r}."
            raise BadRequest(message, param="continue_final_message")
        if self.continue_final_message and self.messages[-1].tool_calls:
            message = "'continue_final_message' needs a last message without 'tool_calls'."
            raise BadRequest(message, param="continue_final_message")
        if any(message.role == "tool" for message in self.messages):
            require_calls(self.messages)
        return self

    @cached_property
    def offered_tools(self) -> OfferedTools | None:
        """Return the tools that the reply may call. Raises BadRequest."""
        if self.tools is None and self.tool_choice is None:
            return None
        return offered_tools(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def form(self) -> tuple[GrammarSource, str] | None:
        form, offered = super().form, self.offered_tools
        return form if offered is None else (offered.grammar(form), "tools")

    @property
    def ignored(self) -> list[str]:
        inner = {
            name for each in self.messages for name, value in (each.model_extra or {}).items() if value is not None
        }
        without_tools = ["parallel_tool_calls"] if self.parallel_tool_calls and not self.tools else []
        return super().ignored + without_tools + [f"messages.{name}" for name in sorted(inner)]

    @property
    def ending(self) -> Literal["reply", "continue", "none"]:
        """Return what follows the messages in the prompt."""
        if self.continue_final_message:
            return "continue"
        return "none" if self.add_generation_prompt is False else "reply"


def _equal(value: Any, other: Any) -> bool:
    """Return whether two JSON values are equal; a boolean is no number."""
    return (type(value) is bool) == (type(other) is bool) and bool(value == other)


@lru_cache(maxsize=1024)
def _misspelt(name: str, known: tuple[str, ...]) -> str | None:
    """Return the field that a name looks like: sooner one of Imprint's own, which decide what is learned."""
    if len(name) > MAX_NAME_CHARS:
        return None
    plain = name.lower().replace("-", "_")
    likely = difflib.get_close_matches(plain, OWN_FIELDS, 1, 0.75) or difflib.get_close_matches(plain, known, 1, 0.85)
    return likely[0] if likely else None
