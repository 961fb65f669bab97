"""OpenAI's route of embeddings."""

import base64
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from service.concurrency import LARGE, dump_json_pieces, run_off_loop
from service.errors import BadRequest
from service.http.dependencies import LargeReply, RulesDep, SessionsDep
from service.http.json_route import JsonRoute
from service.http.openapi import ERROR_RESPONSES
from service.http.schemas import INT32, MAX_PARTS, MODEL_NAME, WHOLE, Body, Text, TextPart, TokenIds
from service.http.sse import until_disconnect
from service.turns.embeddings import Embeddings, embed, require_dimensions, require_encoder
from service.turns.loaded_model import LoadedModel

MAX_TEXTS = 2048  # OpenAI's limit
LARGE_ANSWER = 4096  # numbers

Json = dict[str, Any]

router = APIRouter(prefix="/v1", route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["OpenAI"])

# The tags of unions stand in angle brackets, so that `explain` can remove them from the location of an error.


def _one_kind(value: Any) -> str | None:
    if isinstance(value, dict):
        return "<named>" if "prompt_string" in value else "<parts>"
    return "<text>" if isinstance(value, str) else "<tokens>" if isinstance(value, list) else None


def _kind(value: Any) -> str | None:
    is_list = isinstance(value, list) and (not value or isinstance(value[0], str | list | dict))
    return "<list>" if is_list else _one_kind(value)


_ERROR: Any = {
    "custom_error_type": "input_type",
    "custom_error_message": "should be a string, a list of token ids, or a list of strings or of lists of token ids",
}
NonEmptyText = Annotated[Text, Field(min_length=1)]


class NamedText(Body):
    """A text as llama.cpp's clients may send it."""

    prompt_string: NonEmptyText

    @property
    def text(self) -> str:
        return self.prompt_string


class NonEmptyPart(TextPart):
    """A part of a text to embed."""

    text: NonEmptyText


class PartsOfText(Body):
    """A text in parts, as llama.cpp's clients may send it."""

    content: Annotated[list[NonEmptyPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.content)


OneInput = Annotated[
    Annotated[NonEmptyText, Tag("<text>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[NamedText, Tag("<named>")]
    | Annotated[PartsOfText, Tag("<parts>")],
    Discriminator(_one_kind, **_ERROR),
]
Input = Annotated[
    Annotated[NonEmptyText, Tag("<text>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[NamedText, Tag("<named>")]
    | Annotated[PartsOfText, Tag("<parts>")]
    | Annotated[list[OneInput], Field(min_length=1, max_length=MAX_TEXTS, fail_fast=True), Tag("<list>")],
    Discriminator(_kind, **_ERROR),
]


class EmbeddingRequest(Body):
    """The body of `POST /v1/embeddings`. Other fields are ignored."""

    model_config = ConfigDict(
        extra="ignore",
        json_schema_extra={"examples": [{"model": "smollm2-135m-instruct", "input": ["My cat is called Miso."]}]},
    )

    model: str | None = MODEL_NAME
    input: Input = Field(description="Texts, or token ids of the served model as `POST /tokenize` returns them.")
    encoding_format: Literal["float", "base64"] | None = Field(
        None, description="Default: `float`; `base64`: the vector's numbers as 32-bit floats, little-endian."
    )
    dimensions: Annotated[int, Field(ge=1, le=INT32), WHOLE] | None = Field(
        None, description="Only the encoder's own number is accepted: its vectors cannot be cut."
    )
    user: str | None = Field(None, description="A hint; ignored.")

    @property
    def is_one(self) -> bool:
        return not isinstance(self.input, list) or isinstance(self.input[0], int)

    @property
    def inputs(self) -> list[Any]:
        """Return the inputs as a list of texts and of lists of token ids."""
        inputs = [self.input] if self.is_one else list(self.input)
        return [each.text if isinstance(each, NamedText | PartsOfText) else each for each in inputs]


class Embedding(BaseModel):
    """The vector of one text, of length 1."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """The number of tokens that the encoder has read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The reply of `POST /v1/embeddings`."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    system_fingerprint: str = Field(description="Changes with the encoder: vectors of two encoders do not compare.")
    usage: EmbeddingUsage


@router.post("/embeddings", summary="Turn texts into vectors", response_model=EmbeddingList)
async def create_embedding(
    body: EmbeddingRequest, sessions: SessionsDep, rules: RulesDep, request: Request, response: Response
) -> Json | Response:
    """Return a vector of the meaning of each text, by the server's sentence encoder. No session is used."""
    rules.resolve_model(body.model)
    model = sessions.loaded_model
    encoder = require_encoder(model)
    require_dimensions(body.dimensions, model)
    texts = await run_off_loop(sum(len(each) for each in body.inputs), _texts, body, model)
    embeddings = await until_disconnect(request.receive, embed(sessions, texts, "input"))
    reply = {
        "object": "list",
        "data": _data(embeddings, body.encoding_format == "base64"),
        "model": sessions.model_id,
        "system_fingerprint": f"fp_{encoder.id:08x}",
        "usage": {"prompt_tokens": embeddings.tokens, "total_tokens": embeddings.tokens},
    }
    if len(embeddings.vectors) * encoder.size < LARGE_ANSWER:
        return reply | {"data": list(reply["data"])}
    return LargeReply(await run_off_loop(LARGE, dump_json_pieces, reply), response)


def _texts(body: EmbeddingRequest, model: LoadedModel) -> list[str]:
    """Return the texts of the inputs. Raises BadRequest for a token id that is not in the vocabulary."""
    return [
        each if isinstance(each, str) else _text("input" if body.is_one else f"input.{index}", each, model)
        for index, each in enumerate(body.inputs)
    ]


def _text(param: str, token_ids: list[int], model: LoadedModel) -> str:
    for position, token_id in enumerate(token_ids):
        if token_id >= model.vocab_size:
            where = f"{param}.{position}"
            message = f"'{where}' must be a token id of the vocabulary, below {model.vocab_size}, got {token_id}."
            raise BadRequest(message, param=where)
    return model.tokenizer.decode(token_ids)


def _data(embeddings: Embeddings, as_base64: bool) -> Iterator[Json]:
    for index, vector in enumerate(embeddings.vectors):
        packed = base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_base64 else vector.tolist()
        yield {"object": "embedding", "index": index, "embedding": packed}
