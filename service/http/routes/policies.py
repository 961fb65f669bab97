"""The routes of policies and learners of tables: acting, rewards, and predicting without learning."""

import re
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Response

from service.concurrency import LARGE, dump_json_pieces, run_off_loop
from service.http.dependencies import (
    LargeReply,
    LearningRequestDep,
    PathId,
    PoliciesDep,
    RequestContextDep,
    VersionsDep,
)
from service.http.json_route import JsonRoute
from service.http.openapi import ERROR_RESPONSES, ETAG_RESPONSES
from service.http.policy_replies import Acted, ActedList, Labelled, PredictedList, Valued
from service.http.policy_schemas import ActRequest, ChoiceBody, FeedbackRequest, PredictRequest
from service.http.replies import Observed
from service.http.sse import until_disconnect
from service.turns.policy_turns import ActionSampling, RewardInput
from service.turns.tabular_requests import ArmChoice, Batch, ExampleInput

router = APIRouter(prefix="/v1/sessions", route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["Policies"])
SMALL_BATCH = 8  # replies of more are written off the event loop


@router.post("/{id}/act", summary="Act", responses=ETAG_RESPONSES, response_model=Acted | ActedList)
async def act(
    session: PathId, body: ActRequest, policies: PoliciesDep, learning: LearningRequestDep
) -> dict[str, Any] | Response:
    """Learn the reward of the last action, or of the action that is named, and choose the next action."""
    reward_input = None if body.reward is None else RewardInput(body.reward, body.action_id, body.regret or 0.0)
    choices = [_choice(each) for each in body.batch]
    work = policies.act(
        learning.ctx,
        session,
        body.model,
        body.observation,
        Batch(choices, body.examples is not None) if choices else None,
        reward_input,
        ActionSampling(body.temperature, body.seed),
        if_match=learning.if_match,
    )
    done = await until_disconnect(learning.request.receive, work, body.on_disconnect)
    learning.set_reply_headers(done["adaptation"]["version_to"])
    return await _reply(done, learning.response)


@router.post(
    "/{id}/feedback", summary="Reward an action, or learn the text kept of a completion", responses=ETAG_RESPONSES
)
async def feedback(
    session: PathId,
    body: FeedbackRequest,
    policies: PoliciesDep,
    versions: VersionsDep,
    learning: LearningRequestDep,
) -> Observed:
    """Learn the reward of an earlier action (`action_id`, `reward`), or of several (`examples`, a list of those, which
    become one version), without choosing another action; or learn the text
    that a user kept of a completion (`completion_id`, `text`), after the prompt where the session keeps texts
    (`keep_text`)."""
    if body.text is not None and body.completion_id is not None:
        ((prefix, completion_key),) = re.findall("^([a-z]+)[-_]([0-9a-f]{32})", body.completion_id)
        work = versions.learn_kept_text(
            learning.ctx, session, completion_key, body.text, is_reply=prefix != "cmpl", if_match=learning.if_match
        )
    else:
        rewards = [RewardInput(each.reward, each.action_id, each.regret or 0.0) for each in body.batch]
        is_list = body.examples is not None
        work = policies.feedback(learning.ctx, session, rewards, is_list=is_list, if_match=learning.if_match)
    done = await until_disconnect(learning.request.receive, work, body.on_disconnect)
    learning.set_reply_headers(done.version)
    return Observed(**asdict(done))


@router.post("/{id}/predict", summary="Predict", response_model=Labelled | Valued | PredictedList)
async def predict(
    session: PathId, body: PredictRequest, policies: PoliciesDep, ctx: RequestContextDep, response: Response
) -> dict[str, Any] | Response:
    """Predict the label or the number of an example, or of several, with what the session has learned, and learn
    nothing."""
    examples = Batch([ExampleInput(features) for features in body.batch], body.examples is not None)
    return await _reply(await policies.predict(ctx, session, body.model, examples), response)


def _choice(body: ChoiceBody | ActRequest) -> ArmChoice:
    """Return a decision as the engine takes it."""
    arms = body.actions or []
    features = [{} if isinstance(arm, str) else arm.features for arm in arms]
    return ArmChoice(
        {} if body.context is None else body.context,
        tuple(arm if isinstance(arm, str) else arm.id for arm in arms),
        tuple(features) if any(features) else None,
        None if body.allowed is None else frozenset(body.allowed),
        body.forced,
        body.propensity or 1.0,
        body.temperature,
        body.seed,
    )


async def _reply(done: dict[str, Any], response: Response) -> dict[str, Any] | Response:
    """Return a reply; one of many examples as text, which is written off the event loop."""
    if len(done.get("data", ())) <= SMALL_BATCH:
        return done
    return LargeReply(await run_off_loop(LARGE, dump_json_pieces, done), response)
