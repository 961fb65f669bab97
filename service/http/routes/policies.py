"""Routes of policies: acting and its rewards, and labelling without learning."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from service.http.replies import Acted, Labelled, Observed
from service.http.routes.common import ERRORS, LearningRequestDep, RequestContextDep, V1Route, VersionsDep, get_sessions
from service.http.routes.sessions import ETAG_RESPONSES, PathId
from service.http.schemas import ActRequest, FeedbackRequest, PredictRequest
from service.turns.policy_turns import ActionSampling, PolicyTurns, RewardInput

router = APIRouter(prefix="/v1/sessions", route_class=V1Route, responses=ERRORS, tags=["Policies"])


async def get_policies(request: Request) -> PolicyTurns:
    """What can be asked of the policies."""
    return PolicyTurns(get_sessions(request))


PoliciesDep = Annotated[PolicyTurns, Depends(get_policies)]


@router.post("/{id}/act", summary="Act", responses=ETAG_RESPONSES)
async def act(session: PathId, body: ActRequest, policies: PoliciesDep, learning: LearningRequestDep) -> Acted:
    """Learns the reward of the last action, or of the one named, and takes the next action."""
    reward_input = None if body.reward is None else RewardInput(body.reward, body.action_id, body.regret or 0.0)
    action_sampling = ActionSampling(body.temperature, body.seed)
    work = policies.act(
        learning.ctx, session, body.model, body.observation, reward_input, action_sampling, if_match=learning.if_match
    )
    done = await learning.run_until_disconnect(work, body.on_disconnect)
    learning.set_etag(done.adaptation.version_to)
    return Acted(object="action", **done.as_json())


@router.post(
    "/{id}/feedback", summary="Reward an action, or tell what was kept of a completion", responses=ETAG_RESPONSES
)
async def feedback(
    session: PathId,
    body: FeedbackRequest,
    policies: PoliciesDep,
    versions: VersionsDep,
    learning: LearningRequestDep,
) -> Observed:
    """Learns the reward of an earlier action (`action_id`, `reward`), without taking another; or the text that a user
    kept of a completion (`completion_id`, `text`), behind its prompt if the session keeps texts (`keep_text`)."""
    if body.text is not None and body.completion_id is not None:
        completion_key = body.completion_id.rpartition("-")[2]
        work = versions.learn_kept_text(learning.ctx, session, completion_key, body.text, if_match=learning.if_match)
    else:
        reward_input = RewardInput(body.reward or 0.0, body.action_id, body.regret or 0.0)
        work = policies.feedback(learning.ctx, session, reward_input, if_match=learning.if_match)
    done = await learning.run_until_disconnect(work, body.on_disconnect)
    learning.set_etag(done.version)
    return Observed(**asdict(done))


@router.post("/{id}/predict", summary="Label an example")
async def predict(session: PathId, body: PredictRequest, policies: PoliciesDep, ctx: RequestContextDep) -> Labelled:
    """Labels an example with what the session has learned; learns nothing."""
    done = await policies.predict(ctx, session, body.model, body.features)
    return Labelled(object="label", **asdict(done))
