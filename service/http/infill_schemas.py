"""The bodies of llama.cpp's own routes, which return one text: requests and reply."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    StringConstraints,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from model.text.infill import Snippet
from service.errors import BadRequest
from service.http.faults import explain
from service.http.foreign_fields import COMPLETION_UNSUPPORTED
from service.http.generation_schemas import MAX_BIASES, CompletionRequest, Count, SinglePrompt
from service.http.replies import Timings
from service.http.schemas import (
    ADAPT,
    LEARN,
    MODEL_NAME,
    ON_DISCONNECT,
    RECALL,
    SESSION,
    Body,
    OnDisconnect,
    SessionId,
    Text,
    limit_entries,
)
from service.types import Adaptation, AdaptMode, LearnMode

MAX_SNIPPETS = 256
MAX_FILENAME_CHARS = 1024
MAX_RESPONSE_FIELDS = 64
MAX_TOKENS = 128  # by default: suggestions are short, and a small base never ends by itself
# Fields of completions for whose effect the reply has no room, with the values that have none.
NOT_IN_REPLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "echo": (False,),
    "logprobs": (),
    "prompt_logprobs": (),
}
OWN_NAMES = (
    *("input_prefix", "input_suffix", "input_extra", "prompt", "response_fields", "return_tokens"),
    "post_sampling_probs",
    "logit_bias",  # the route turns texts into token ids
)
MAX_BIASED_CHARS = 256  # of a text whose tokens get a bias
NEVER = -100.0  # the bias of `false`

Json = dict[str, Any]


def _bias_kind(value: Any) -> str | None:
    return "<list>" if isinstance(value, list) else "<object>" if isinstance(value, dict) else None


# The tags of unions stand in angle brackets, so that `explain` can remove them from the location of an error.
BiasedText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_BIASED_CHARS)]
Bias = Annotated[
    float,
    Field(ge=-100, le=100),
    BeforeValidator(lambda value: NEVER if value is False else value),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": -100, "maximum": 100}, {"const": False}]}),
]
BiasedToken = Annotated[
    Annotated[BiasedText, Tag("<text>")] | Annotated[Count, Tag("<token>")],
    Discriminator(lambda value: "<text>" if isinstance(value, str) else "<token>"),
]
BiasPair = Annotated[
    tuple[BiasedToken, Bias], BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
]
Biases = Annotated[
    Annotated[
        dict[BiasedText, Bias],
        Field(json_schema_extra={"maxProperties": MAX_BIASES}),
        BeforeValidator(lambda value: limit_entries(value, MAX_BIASES)),
        Tag("<object>"),
    ]
    | Annotated[list[BiasPair], Field(max_length=MAX_BIASES, fail_fast=True), Tag("<list>")],
    Discriminator(
        _bias_kind,
        custom_error_type="bias_type",
        custom_error_message="should be an object, or a list of pairs of a token and its bias",
    ),
]


class OneTextCompletion(CompletionRequest):
    """The completion of one text. The order of samplers, which clients of llama.cpp always send, is ignored."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        name: values for name, values in COMPLETION_UNSUPPORTED.items() if name != "samplers"
    }

    @model_validator(mode="after")
    def _one_text(self) -> "OneTextCompletion":
        for name, values in NOT_IN_REPLY.items():
            value = getattr(self, name)
            if value is not None and value not in values:
                raise BadRequest(f"'{name}' is not supported here: the reply is one text, got {value!r}.", param=name)
        return self


class InfillSnippet(Body):
    """Text of another place; unknown fields, such as the time at which an editor took it, are ignored."""

    model_config = ConfigDict(extra="ignore")

    text: Text
    filename: Annotated[str, Field(max_length=MAX_FILENAME_CHARS)] = "tmp"


class OneTextRequest(Body):
    """The fields that llama.cpp's own routes share; the options of completions come besides them."""

    model: str | None = MODEL_NAME
    response_fields: (
        Annotated[list[Annotated[str, Field(max_length=128)]], Field(max_length=MAX_RESPONSE_FIELDS, fail_fast=True)]
        | None
    ) = Field(None, description="The fields of the reply, a path such as `timings/prompt_n` for an inner one.")
    return_tokens: bool | None = Field(
        None, description="True: the reply has the ids of its tokens; the parts of a stream always have theirs."
    )
    post_sampling_probs: bool | None = Field(
        None, description="True: `n_probs` are probabilities after all samplers: `prob` and `top_probs`."
    )
    logit_bias: Biases | None = Field(
        None,
        description="Biases of tokens, as an object or as a list of pairs. A text, unless it is a number as a name"
        " in an object, stands for its tokens; `false` is -100.",
    )
    session: SessionId | None = SESSION
    adapt: AdaptMode | None = ADAPT
    learn: LearnMode | None = LEARN
    recall: bool | None = RECALL
    on_disconnect: OnDisconnect | None = ON_DISCONNECT
    _completion: OneTextCompletion | None = PrivateAttr(None)

    @property
    def completion(self) -> CompletionRequest:
        """Return the completion that writes the text."""
        assert self._completion is not None
        return self._completion

    @property
    def biases(self) -> Sequence[tuple[str | int, float]]:
        """Return the biases of texts and of token ids."""
        if isinstance(self.logit_bias, dict):
            named = self.logit_bias.items()
            return [(int(key) if key.isascii() and key.isdecimal() else key, bias) for key, bias in named]
        return self.logit_bias or ()

    def _read(self, max_tokens: int, **prompt: Any) -> OneTextCompletion:
        """Return the completion with this prompt. max_tokens: where the request has no limit."""
        named = {name: value for name, value in self if name not in OWN_NAMES and value is not None}
        if {"n_predict", "max_tokens"}.isdisjoint(named):
            named["n_predict"] = max_tokens
        try:
            return OneTextCompletion.model_validate(named | prompt)
        except ValidationError as error:
            raise explain([fault | {"loc": ("body", *fault["loc"])} for fault in error.errors()]) from error


class InfillRequest(OneTextRequest):
    """The body of `POST /infill`: the texts around a gap, other texts that may help, and the options of completions."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={
            "examples": [
                {
                    "input_prefix": "def add(a, b):\n",
                    "input_suffix": "\n\nprint(add(1, 2))\n",
                    "prompt": "    return ",
                    "n_predict": 16,
                    "session": "repo",
                }
            ]
        },
    )

    input_prefix: Text = Field("", description="The text before the gap.")
    input_suffix: Text = Field("", description="The text after the gap.")
    input_extra: Annotated[list[InfillSnippet], Field(max_length=MAX_SNIPPETS, fail_fast=True)] = Field(
        [], description="Texts of other places, which stand before the text; the last one is the nearest."
    )
    prompt: Text = Field("", description="Text right before the gap, after `input_prefix`.")

    @model_validator(mode="after")
    def _as_completion(self) -> "InfillRequest":
        self._completion = self._read(MAX_TOKENS, prompt=self.input_prefix + self.prompt, suffix=self.input_suffix)
        return self

    @property
    def snippets(self) -> list[Snippet]:
        return [Snippet(each.text, each.filename) for each in self.input_extra]

    @property
    def asks_nothing(self) -> bool:
        """Return whether no text is wanted: editors send such requests to fill a cache of prompts, which is not here.

        llama.vim's has no tokens to predict; llama.vscode's has texts of other places alone.
        """
        has_text = bool(self.input_prefix or self.input_suffix or self.prompt)
        limits = (self.completion.n_predict, self.completion.max_tokens)
        return not has_text or 0 in limits


class OneTextCompletionRequest(OneTextRequest):
    """The body of `POST /completion`: one prompt, and the options of completions."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra={"examples": [{"prompt": "My cat is called Miso. She likes", "n_predict": 16}]},
    )

    prompt: SinglePrompt

    @model_validator(mode="after")
    def _as_completion(self) -> "OneTextCompletionRequest":
        self._completion = self._read(-1, prompt=self.prompt)
        return self


class TokensCut(BaseModel):
    """The numbers of tokens that the prompt had no room for."""

    prefix: int
    suffix: int
    extra: int


class ShownToken(BaseModel):
    """A token that the text might have had; `bytes` are exact, `token` may show only a part of a character."""

    id: int
    token: str
    bytes: list[int]


class TokenChance(ShownToken):
    """A token and its log-probability (nats)."""

    logprob: float


class WrittenToken(TokenChance):
    """A token of the text, and the likeliest tokens in its place."""

    top_logprobs: list[TokenChance]


class DrawnChance(ShownToken):
    """A token and its probability after all samplers."""

    prob: float


class DrawnToken(DrawnChance):
    """A token of the text, and the likeliest tokens in its place, after all samplers."""

    top_probs: list[DrawnChance]


class GenerationSettings(BaseModel):
    """The options that the text was written with, by llama.cpp's names."""

    n_predict: int
    seed: int | None = Field(description="Null: one was drawn.")
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    repeat_last_n: int
    presence_penalty: float
    frequency_penalty: float
    ignore_eos: bool
    stop: list[str]
    n_probs: int
    post_sampling_probs: bool
    stream: bool


class InfillReply(BaseModel):
    """The reply of `POST /infill` and `/completion`, by llama.cpp's names; in a stream, the last event.

    With `response_fields`, it has those fields alone.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema: schema.pop("required", None))

    id: str
    index: int
    content: str
    tokens: list[int] = Field(description="The ids of the text's tokens, with `return_tokens`.")
    completion_probabilities: list[WrittenToken] | list[DrawnToken] | None = Field(
        description="With `n_probs`: the text's tokens, each with so many likeliest ones; in a stream, of the parts."
    )
    prompt: str = Field(description="The text of the whole prompt.")
    generation_settings: GenerationSettings
    model: str
    stop: Literal[True]
    stop_type: Literal["eos", "word", "limit", "none"]
    stopping_word: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    has_new_line: bool
    truncated: bool
    tokens_cut: TokensCut
    timings: Timings
    adaptation: Adaptation | None
