"""vLLM's and llama.cpp's routes of the tokenizer and the chat template. None of them uses a session."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.concurrency import LARGE, dump_json_pieces, run_off_loop
from service.errors import BadRequest
from service.http import field_rules
from service.http.dependencies import LargeReply, RulesDep, SessionsDep
from service.http.generation_schemas import ChatMessage, Count
from service.http.json_route import MAX_VALUES, JsonRoute
from service.http.openapi import ERROR_RESPONSES
from service.http.schemas import MAX_MESSAGES, MODEL_NAME, Body, Text
from service.http.tool_schemas import Tools, listed_tools
from service.turns.loaded_model import LoadedModel
from service.turns.prompts import ChatPrompt, encode_async, render_async

LARGE_ANSWER = 4096  # tokens

Json = dict[str, Any]

router = APIRouter(route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["Tokens"])


class ChatBody(Body):
    """A chat as the template gets it; the other fields of chat completions are ignored."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"messages": [{"role": "user", "content": "Hello."}]}]}
    )

    model: str | None = MODEL_NAME
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    tools: Tools | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @property
    def prompt(self) -> ChatPrompt:
        """Return the chat with what follows its messages."""
        ending: Literal["reply", "continue", "none"] = "reply" if self.add_generation_prompt else "none"
        if self.continue_final_message:
            ending = "continue"
        return ChatPrompt([message.plain() for message in self.messages], ending, listed_tools(self.tools or ()))


class TokenizeRequest(Body):
    """The body of `POST /tokenize`: vLLM's `prompt` or `messages`, or llama.cpp's `content`; others are ignored."""

    model_config = ConfigDict(
        extra="ignore", json_schema_extra={"examples": [{"prompt": "My cat is called Miso."}], **field_rules.TOKENIZE}
    )

    model: str | None = MODEL_NAME
    prompt: Text | None = None
    content: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tools: Tools | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = Field(True, description="Whether `prompt` begins with BOS, where the model has it.")
    add_special: bool = Field(False, description="Whether `content` begins with BOS, where the model has it.")
    with_pieces: bool = Field(False, description="Return each token with its text.")
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_of(self) -> "TokenizeRequest":
        given = [name for name in ("prompt", "content", "messages") if getattr(self, name) is not None]
        if len(given) != 1:
            fault = "neither" if not given else " and ".join(given)
            raise BadRequest(f"Give one of 'prompt', 'content' and 'messages', got {fault}.", param="prompt")
        return self


class DetokenizeRequest(Body):
    """The body of `POST /detokenize`. Other fields are ignored."""

    model_config = ConfigDict(extra="ignore", json_schema_extra={"examples": [{"tokens": [101, 7, 32]}]})

    model: str | None = MODEL_NAME
    tokens: Annotated[list[Count], Field(fail_fast=True)]


class TokenPiece(BaseModel):
    """A token and its text; a part of a character comes as bytes."""

    id: int
    piece: str | list[int]


class Tokenized(BaseModel):
    """The reply of `POST /tokenize`."""

    count: int
    max_model_len: int = Field(description="Tokens that one request may hold, prompt and reply together.")
    tokens: list[int] | list[TokenPiece]
    token_strs: list[str] | None = Field(description="The texts of the tokens, with `return_token_strs`.")


class Detokenized(BaseModel):
    """The reply of `POST /detokenize`: the text by vLLM's name and by llama.cpp's."""

    prompt: str
    content: str


class Rendered(BaseModel):
    """The reply of `POST /apply-template`."""

    prompt: str


@router.post("/tokenize", summary="Turn text into tokens", response_model=Tokenized)
async def tokenize(
    body: TokenizeRequest, sessions: SessionsDep, rules: RulesDep, response: Response
) -> Json | Response:
    """Return the token ids of a text or a chat."""
    rules.resolve_model(body.model)
    model = sessions.loaded_model
    token_ids = await _token_ids(body, model)
    if len(token_ids) > MAX_VALUES:
        raise BadRequest(f"The text may have {MAX_VALUES} tokens, got {len(token_ids)}.", code="too_many_tokens")
    answer = await run_off_loop(len(token_ids), _tokenized, token_ids, body, model)
    if len(token_ids) < LARGE_ANSWER:
        return answer
    return LargeReply(await run_off_loop(LARGE, dump_json_pieces, answer), response)


@router.post("/detokenize", summary="Turn tokens into text")
async def detokenize(body: DetokenizeRequest, sessions: SessionsDep, rules: RulesDep) -> Detokenized:
    """Return the text of token ids, with the texts of special tokens."""
    rules.resolve_model(body.model)
    model = sessions.loaded_model
    text = await run_off_loop(len(body.tokens), _detokenized, body.tokens, model)
    return Detokenized(prompt=text, content=text)


@router.post("/apply-template", summary="Render a chat")
async def apply_template(body: ChatBody, sessions: SessionsDep, rules: RulesDep) -> Rendered:
    """Return the text that a chat is for the model."""
    rules.resolve_model(body.model)
    return Rendered(prompt=await render_async(body.prompt, sessions.loaded_model.tokenizer))


async def _token_ids(body: TokenizeRequest, model: LoadedModel) -> Sequence[int]:
    tokenizer = model.tokenizer
    if body.messages is not None:
        fields = {name: getattr(body, name) for name in ("tools", "add_generation_prompt", "continue_final_message")}
        chat = ChatBody(messages=body.messages, **fields)
        return (await encode_async(chat.prompt, tokenizer, (), reply=True)).token_ids
    text = body.prompt if body.prompt is not None else body.content or ""
    token_ids = await run_off_loop(len(text), tokenizer.encode_array, text)
    keeps_bos = body.add_special_tokens if body.prompt is not None else body.add_special
    return token_ids if keeps_bos or not tokenizer.add_bos else token_ids[1:]


def _tokenized(token_ids: Sequence[int], body: TokenizeRequest, model: LoadedModel) -> Json:
    pieces = [model.tokenizer.token_bytes(token_id) for token_id in token_ids]
    tokens: list[Any] = list(token_ids)
    if body.with_pieces:
        tokens = [{"id": i, "piece": _piece(piece)} for i, piece in zip(token_ids, pieces, strict=True)]
    texts = [piece.decode(errors="replace") for piece in pieces] if body.return_token_strs else None
    return {"count": len(token_ids), "max_model_len": model.context, "tokens": tokens, "token_strs": texts}


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _detokenized(token_ids: Sequence[int], model: LoadedModel) -> str:
    for position, token_id in enumerate(token_ids):
        if token_id >= model.vocab_size:
            param = f"tokens.{position}"
            message = f"'{param}' must be a token id of the vocabulary, below {model.vocab_size}, got {token_id}."
            raise BadRequest(message, param=param)
    return b"".join(map(model.tokenizer.token_bytes, token_ids)).decode(errors="replace")
