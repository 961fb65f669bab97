"""The query parameters of requests."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from service.http.schemas import SAFE_INTEGER, SESSION_ID


class Page(BaseModel):
    """The query of `GET /v1/sessions`: a page of the list."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="Largest number of sessions to return.")
    after: str = Field(
        "", pattern=rf"^$|{SESSION_ID}", description="Only ids after this one: `next` of the page before."
    )


class LogPage(BaseModel):
    """The query of `GET /v1/sessions/{id}/log`: a page of the log."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000, description="Largest number of commits to return.")
    before: int | None = Field(
        None, ge=1, le=SAFE_INTEGER, description="Only versions before this one: `next` of the page before."
    )
    text: bool = Field(True, description="False: without the learned texts, which are large.")


class EpisodePage(BaseModel):
    """The query of `GET /v1/sessions/{id}/episodes`: which episodes, and a page of them."""

    model_config = ConfigDict(extra="forbid")

    query: str = Field(
        "",
        max_length=256,
        description="Only episodes with each of these words or parts of words, whatever their case, or of a like"
        " meaning, where the server has a sentence encoder.",
    )
    asks: bool | None = Field(
        None, description="False: leave out the episodes that only ask, which no reply reads; true: only those."
    )
    version: int | None = Field(None, ge=1, le=SAFE_INTEGER, description="Only episodes that this version taught.")
    limit: int = Field(100, ge=1, le=1000, description="Largest number of episodes to return.")
    before: int | None = Field(
        None, ge=1, le=SAFE_INTEGER, description="Only episodes before this one: `next` of the page before."
    )


class ItemPage(BaseModel):
    """The query of OpenAI's lists of items: a page of the list. Other parameters are ignored."""

    limit: int = Field(20, ge=1, le=100, description="Largest number of items to return.")
    after: str | None = Field(None, max_length=256, description="Only items after this one: `last_id` of a page.")
    order: Literal["asc", "desc"] = Field("desc", description="The oldest or the newest items first.")


class Span(BaseModel):
    """The query of `GET /v1/sessions/{id}/diff`: two versions of a session."""

    model_config = ConfigDict(extra="forbid")

    start: int = Field(
        alias="from", ge=0, le=SAFE_INTEGER, examples=[1], description="The first version; 0 = nothing learned."
    )
    end: int = Field(alias="to", ge=0, le=SAFE_INTEGER, examples=[2], description="The second version.")
