"""The bodies of requests: what all of them are made of, and Imprint's own.

The bodies are strict: unknown fields are refused, and a boolean, a string or NaN is no number. The bodies of
completions, which any client of OpenAI's interface sends, are in `service/http/generation_schemas.py`.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    StringConstraints,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, PydanticKnownError, core_schema

from model.tabular.limits import MAX_ABS, MAX_BATCH, MAX_COLUMNS, MAX_NAME_BYTES
from model.text.tool_calls import MAX_CALLS, message_text, plain_arguments
from service.errors import BadRequest
from service.http import field_rules
from service.types import AdaptMode, LearnMode

SESSION_ID = r"^[A-Za-z0-9][A-Za-z0-9._~:@+=-]{0,127}$"
NAME_RULE = "may have 128 characters: letters from a to z, digits and . _ ~ : @ + = -, the first a letter or a digit"
MAX_FIELDS = 64
MAX_MESSAGES = 1024  # of a chat: as many as a session knows again
MAX_PARTS = 1024  # of a message
MAX_CHOICES = 16
MAX_VERSIONS = 512  # that one request unlearns: as many as a log has
MAX_SOURCE_CHARS = 512
INT32 = 2**31 - 1
INT64 = 2**63 - 1
SAFE_INTEGER = 2**53 - 1  # the largest integer that every reader of JSON has


def _integer(value: Any) -> Any:
    """Return the integer that a number without a fraction is, as in JSON Schema."""
    return int(value) if type(value) is float and value.is_integer() else value


def _integers(value: Any) -> Any:
    """Return a list with an integer for each number without a fraction."""
    return [_integer(item) for item in value] if type(value) is list and float in set(map(type, value)) else value


def _value(value: Any) -> Any:
    """Return a value of a row: a number, a string, a boolean or null. Raises PydanticCustomError."""
    if isinstance(value, str | bool) or value is None:
        return value
    if not isinstance(value, int | float):
        raise PydanticCustomError("value_type", "should be a number, a string, a boolean or null")
    if not abs(value) <= MAX_ABS:
        raise PydanticCustomError("value_range", f"should be in {-MAX_ABS:g}..{MAX_ABS:g}")
    return value


def _label(value: Any) -> Any:
    """Return a label: a name, or a number from 0 on. Raises PydanticCustomError."""
    value = _integer(value)
    is_number = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= INT32
    if not is_number and not (isinstance(value, str) and 1 <= len(value) <= MAX_NAME_BYTES):
        raise PydanticCustomError(
            "label", f"should be a name of 1 to {MAX_NAME_BYTES} bytes, or an integer from 0 to {INT32}"
        )
    return value


def _without_bom(text: str) -> str:
    """Return a text without the byte order mark that editors put at the start of a file."""
    return text.removeprefix("\ufeff")


def _object_or_list(value: Any) -> str | None:
    return "<object>" if isinstance(value, dict) else "<list>" if isinstance(value, list) else None


def limit_entries(value: Any, limit: int) -> Any:
    """Refuse an object with more than `limit` entries at once: each faulty entry would cost an error of its own."""
    if isinstance(value, dict) and len(value) > limit:
        raise PydanticCustomError("too_long", f"should have at most {limit} entries, not {len(value)}")
    return value


SessionId = Annotated[str, StringConstraints(pattern=SESSION_ID)]
WHOLE = BeforeValidator(_integer)
# OpenAPI writes bounds as floats, which cannot hold these.
Seed = Annotated[int, Field(ge=-INT64 - 1, le=INT64), WHOLE, WithJsonSchema({"type": "integer", "format": "int64"})]
Text = Annotated[str, AfterValidator(_without_bom)]
OnDisconnect = Literal["rollback", "commit"]
NonEmpty = Annotated[str, StringConstraints(min_length=1)]
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]
CallId = Annotated[str, StringConstraints(min_length=1, max_length=256)]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=INT32)]], Field(min_length=1, fail_fast=True), BeforeValidator(_integers)
]

ON_DISCONNECT = Field(
    None, description="The end of the turn if its client disconnects; default `rollback`: the turn has no effect."
)
SESSION = Field(None, description="The session whose memory is used and updated; none = the frozen base.")
ADAPT = Field(
    None, description="Read and write the memory, only write, or only read; default: the session's, else `both`."
)
LEARN = Field(None, description="The part that is learned; default: the session's, else `prompt`.")
RECALL = Field(
    None,
    description="False: the reply reads no episodes of the session, and the text is not kept as an episode. Default:"
    " the session's, else true.",
)
MODEL = Field(None, description="The policy; required for a session that does not exist yet.")
MODEL_NAME = Field(
    None, description="Default: the language model; one of its names, perhaps with a mode and a session."
)
LEARN_TOOL_RESULTS = Field(
    None, description="True: messages of the role `tool` are learned like others. Default: false, since they are bulk."
)
Number = Annotated[float, Field(ge=-MAX_ABS, le=MAX_ABS)]
NUMBER_SCHEMA = {"type": "number", "minimum": -MAX_ABS, "maximum": MAX_ABS}
VALUE_SCHEMA = {"anyOf": [NUMBER_SCHEMA, {"type": "string"}, {"type": "boolean"}, {"type": "null"}]}
Value = Annotated[Any, PlainValidator(_value), WithJsonSchema(VALUE_SCHEMA)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=MAX_NAME_BYTES)]
LABEL_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_NAME_BYTES},
        {"type": "integer", "minimum": 0, "maximum": INT32},
    ]
}
LabelName = Annotated[Any, PlainValidator(_label), WithJsonSchema(LABEL_SCHEMA)]
# The columns of a row, by name or by position. A policy of fixed shapes takes a list of numbers.
Features = Annotated[
    Annotated[
        dict[Name, Value],
        BeforeValidator(lambda value: limit_entries(value, MAX_COLUMNS)),
        Field(max_length=MAX_COLUMNS),
        Tag("<object>"),
    ]
    | Annotated[list[Value], Field(min_length=1, max_length=65_536, fail_fast=True), Tag("<list>")],
    Discriminator(
        _object_or_list,
        custom_error_type="features_type",
        custom_error_message="should be an object or a list of values",
    ),
]
FEATURES = Field(
    None, description="A row: an object of columns, or a list. A value is a number, a string, true, false or null."
)
LABEL = Field(None, description="The label to learn: for `labels` a name, for a policy of fixed shapes its number.")
TARGET = Field(None, description="The number to learn, for `regression`.")
# Of a completion, of Anthropic's messages, or of a response, whose id may end with its session.
COMPLETION_ID = r"^(((chat)?cmpl-|msg_)[0-9a-f]{32}|resp_[0-9a-f]{32}(_[A-Za-z0-9._~:@+=-]{1,128})?)$"
CompletionId = Annotated[str, StringConstraints(pattern=COMPLETION_ID)]


def session_id(value: str, param: str) -> str:
    """Return `value`. Raises BadRequest on `param` if `value` cannot name a session."""
    if re.fullmatch(SESSION_ID, value) is None:
        got = f"{value[:80]!r} of {len(value)} characters"
        raise BadRequest(f"'{param}': the name of a session {NAME_RULE}, got {got}.", param=param)
    return value


def session_of_user(user: str) -> str:
    """Return the session that OpenAI's `user` names: the text, or a hash of a text that cannot name a session."""
    is_name = re.fullmatch(SESSION_ID, user) is not None
    return user if is_name else "user-" + hashlib.sha256(user.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Unsupported:
    """Marks a field that the server cannot honour; null and `values` change nothing and are accepted.

    instead: name of the field that replaces this one.
    """

    values: tuple[Any, ...] = ()
    instead: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "enum": [None, *self.values],
            "description": "Not supported: only values that change nothing are accepted.",
        }

    def _check(self, value: Any) -> Any:
        if value is None or any(type(value) is type(one) and value == one for one in self.values):
            return value
        advice = f"; use '{self.instead}'" if self.instead else ""
        raise PydanticCustomError("unsupported", f"is not supported by this server{advice}")


class Body(BaseModel):
    """A JSON object in the body of a request."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _limit_fields(cls, value: Any) -> Any:
        return limit_entries(value, MAX_FIELDS)


# The tags of unions stand in angle brackets, so that `explain` can remove them from the location of an error.


def text_or_list(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<list>" if isinstance(value, list) else None


def text_or_object(value: Any) -> str | None:
    return "<text>" if isinstance(value, str) else "<object>" if isinstance(value, dict) else None


TEXT_OR_PARTS = Discriminator(
    text_or_list, custom_error_type="content_type", custom_error_message="should be a string or a list of text parts"
)


class TextPart(Body):
    """A part of a message's content; only text is supported."""

    type: Literal["text"]
    text: Text


Part = TypeVar("Part", bound=TextPart)
TextOrParts = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<list>")],
    TEXT_OR_PARTS,
]


class MessageFunction(Body):
    """A tool that was called, and its arguments as JSON."""

    model_config = ConfigDict(extra="ignore")

    name: ToolName
    arguments: Annotated[str, AfterValidator(plain_arguments)]


class MessageToolCall(Body):
    """A call in a message of the assistant; unknown fields, which other servers put into their replies, are ignored."""

    model_config = ConfigDict(extra="ignore")

    id: CallId
    type: Literal["function"] = "function"
    function: MessageFunction


class Message(Body):
    """A message of a chat."""

    model_config = ConfigDict(json_schema_extra=field_rules.MESSAGE)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Annotated[list[MessageToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = Field(
        None, description="The assistant's calls of tools; the content may then be null."
    )
    function_call: Annotated[Any, Unsupported(instead="tool_calls")] = None
    content: TextOrParts[TextPart] | None = Field(None, validate_default=True)
    reasoning_content: str | None = Field(None, description="For the chat template; never learned.")
    name: str | None = None
    tool_call_id: CallId | None = Field(None, description="The call that a tool's message answers.")
    refusal: Annotated[Any, Unsupported()] = None
    audio: Annotated[Any, Unsupported()] = None
    annotations: Annotated[Any, Unsupported(([],))] = None

    @field_validator("tool_calls")
    @classmethod
    def _of_the_assistant(
        cls, value: list[MessageToolCall] | None, info: ValidationInfo
    ) -> list[MessageToolCall] | None:
        if value and info.data.get("role", "assistant") != "assistant":
            raise PydanticCustomError("of_the_assistant", "only messages of the assistant call tools")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _content_or_calls(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise PydanticKnownError("missing")
        return value

    def plain(self) -> dict[str, str]:
        """Return the message for the chat template: parts joined, calls as text, and `developer` under its older name
        `system`."""
        content = self.content or ""
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        if self.tool_calls:
            text = message_text(text, [(call.function.name, call.function.arguments) for call in self.tool_calls])
        message = {"role": "system" if self.role == "developer" else self.role, "content": text}
        given = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content,
        }
        return message | {key: value for key, value in given.items() if value is not None}


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]


class SessionOptions(Body):
    """The body of `PUT /v1/sessions/{id}`: defaults for the session's requests, and how long data is kept."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"adapt": "both", "learn": "all"}]})

    adapt: AdaptMode | None = None
    learn: LearnMode | None = None
    recall: bool | None = Field(
        None, description="False: the session keeps no episodes, and its replies read none. Default: true."
    )
    keep_text: bool | None = Field(None, description="Keep the learned texts while their commits can be undone.")
    model: str | None = Field(None, description="The policy of a new session; default: the language model.")
    floor: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="`bandit`: least probability of each allowed action; of n actions, 1/n at most. Default: 0."
    )
    explore: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None,
        description="`bandit`: largest probability of all actions together but the likeliest; `floor` goes first."
        " Default: 1.",
    )
    holdout: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="`bandit`: share of the decisions that `control` takes, to measure the lift. Default: 0."
    )
    control: Literal["uniform", "first"] | None = Field(
        None, description="`bandit`: who decides in the holdout: any allowed action equally often, or the first one."
    )
    ttl_s: Annotated[int, Field(ge=0, le=315_360_000), WHOLE] | None = Field(
        None, description="Seconds after the last use until the session is erased; 0 = never. Default: the server's."
    )


class Rollback(Body):
    """The body of `POST /v1/sessions/{id}/rollback`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 3}]})

    version: Annotated[int, Field(ge=0, le=SAFE_INTEGER), WHOLE]


class Unlearn(Body):
    """The body of `POST /v1/sessions/{id}/unlearn`: a version, or several that are unlearned in one turn."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"version": 3}], **field_rules.UNLEARN})

    version: Annotated[int, Field(ge=0, le=SAFE_INTEGER), WHOLE] | None = None
    versions: (
        Annotated[
            list[Annotated[int, Field(ge=0, le=SAFE_INTEGER)]],
            Field(min_length=1, max_length=MAX_VERSIONS, fail_fast=True),
            BeforeValidator(_integers),
        ]
        | None
    ) = None
    erase: bool = Field(
        False,
        description="True: the session can't be rolled back to the versions before, which still have what is unlearned;"
        " they are erased, and the texts that were kept with them.",
    )

    @model_validator(mode="after")
    def _one_of(self) -> "Unlearn":
        if (self.version is None) == (self.versions is None):
            raise BadRequest("Give 'version' or 'versions'.", param="version")
        return self

    @property
    def all_versions(self) -> frozenset[int]:
        """Return the versions to unlearn."""
        return frozenset(self.versions or () if self.version is None else [self.version])


class Fork(Body):
    """The body of `POST /v1/sessions/{id}/fork`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"id": "alice-2"}]})

    id: SessionId


class ExampleBody(Body):
    """An example to learn: its features, and its label or its target."""

    model_config = ConfigDict(json_schema_extra=field_rules.EXAMPLE)

    features: Features
    label: LabelName | None = LABEL
    target: Number | None = TARGET

    @model_validator(mode="after")
    def _one_of(self) -> "ExampleBody":
        if (self.label is None) == (self.target is None):
            raise PydanticCustomError("label_or_target", "give 'label' or 'target' with the features")
        return self


class ObserveRequest(Body):
    """The body of `POST /v1/sessions/{id}/observe`: `text`, `messages`, or (policies) `features` with a `label` or a
    `target`, or `examples`, a list of those, which become one version."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "My cat is called Miso."}], **field_rules.OBSERVE}
    )

    text: Text | None = None
    messages: Messages | None = None
    features: Features | None = FEATURES
    label: LabelName | None = LABEL
    target: Number | None = TARGET
    examples: Annotated[list[ExampleBody], Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)] | None = None
    predict: bool | None = Field(
        None, description="True: the reply has what was predicted for each example before it was learned."
    )
    model: str | None = MODEL
    source: Annotated[str, StringConstraints(min_length=1, max_length=MAX_SOURCE_CHARS)] | None = Field(
        None, description="Where the text comes from, such as the path of a file: kept in the session's log."
    )
    recall: bool | None = RECALL
    learn_tool_results: bool | None = LEARN_TOOL_RESULTS
    on_disconnect: OnDisconnect | None = ON_DISCONNECT

    @model_validator(mode="after")
    def _one_of(self) -> "ObserveRequest":
        ways = ("text", "messages", "features", "examples")
        given = [name for name in ways if getattr(self, name) is not None]
        if len(given) != 1:
            fault = "neither" if not given else " and ".join(given)
            raise BadRequest(f"Give one of 'text', 'messages', 'features' and 'examples', got {fault}.", param="text")
        truths = [name for name in ("label", "target") if getattr(self, name) is not None]
        if self.features is None and truths:
            missing = "'features' and " + repr(truths[0])
            raise BadRequest(f"{missing} go together: give both or none of them.", param="features")
        if self.features is not None and len(truths) != 1:
            raise BadRequest("'features' need a 'label' or a 'target': one of them.", param="label")
        of_text = given[0] in ("text", "messages")
        for name, is_given in (("model", self.model is not None), ("predict", self.predict is not None)):
            if of_text and is_given:
                raise BadRequest(f"'{name}' is only allowed with 'features' and 'examples'.", param=name)
        if not of_text and self.source is not None:
            raise BadRequest(f"'source' is not allowed with '{given[0]}'.", param="source")
        return self

    @property
    def batch(self) -> list[ExampleBody]:
        """The examples to learn."""
        if self.features is None:
            return self.examples or []
        return [ExampleBody.model_construct(features=self.features, label=self.label, target=self.target)]


class ScoreRequest(Body):
    """The body of `POST /v1/sessions/{id}/score`."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "My cat is called Miso.", "learn": False}]})

    text: Text
    learn: bool = False
    recall: bool | None = RECALL
    on_disconnect: OnDisconnect | None = ON_DISCONNECT
