"""The routes of policies: acting, rewards, and labelling without learning."""

import re
from dataclasses import asdict

from fastapi import APIRouter

from service.http.dependencies import LearningRequestDep, PathId, PoliciesDep, RequestContextDep, VersionsDep
from service.http.json_route import JsonRoute
from service.http.openapi import ERROR_RESPONSES, ETAG_RESPONSES
from service.http.replies import Acted, Labelled, Observed
from service.http.schemas import ActRequest, FeedbackRequest, PredictRequest
from service.http.sse import until_disconnect
from service.turns.policy_turns import ActionSampling, RewardInput

router = APIRouter(prefix="/v1/sessions", route_class=JsonRoute, responses=ERROR_RESPONSES, tags=["Policies"])


@router.post("/{id}/act", summary="Act", responses=ETAG_RESPONSES)
async def act(session: PathId, body: ActRequest, policies: PoliciesDep, learning: LearningRequestDep) -> Acted:
    """Learn the reward of the last action, or of the action that is named, and choose the next action."""
    reward_input = None if body.reward is None else RewardInput(body.reward, body.action_id, body.regret or 0.0)
    action_sampling = ActionSampling(body.temperature, body.seed)
    work = policies.act(
        learning.ctx, session, body.model, body.observation, reward_input, action_sampling, if_match=learning.if_match
    )
    done = await until_disconnect(learning.request.receive, work, body.on_disconnect)
    learning.set_reply_headers(done.adaptation.version_to)
    return Acted(object="action", **done.as_json())


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
    """Learn the reward of an earlier action (`action_id`, `reward`) without choosing another action; or learn the text
    that a user kept of a completion (`completion_id`, `text`), after the prompt where the session keeps texts
    (`keep_text`)."""
    if body.text is not None and body.completion_id is not None:
        ((prefix, completion_key),) = re.findall("^([a-z]+)[-_]([0-9a-f]{32})", body.completion_id)
        work = versions.learn_kept_text(
            learning.ctx, session, completion_key, body.text, is_reply=prefix != "cmpl", if_match=learning.if_match
        )
    else:
        reward_input = RewardInput(body.reward or 0.0, body.action_id, body.regret or 0.0)
        work = policies.feedback(learning.ctx, session, reward_input, if_match=learning.if_match)
    done = await until_disconnect(learning.request.receive, work, body.on_disconnect)
    learning.set_reply_headers(done.version)
    return Observed(**asdict(done))


@router.post("/{id}/predict", summary="Label an example")
async def predict(session: PathId, body: PredictRequest, policies: PoliciesDep, ctx: RequestContextDep) -> Labelled:
    """Label an example with what the session has learned, and learn nothing."""
    done = await policies.predict(ctx, session, body.model, body.features)
    return Labelled(object="label", **asdict(done))
