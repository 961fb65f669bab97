"""Routes of policies: acting and its rewards, and labelling without learning."""

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Depends, Request

from service.http.replies import Acted, Labelled, Observed
from service.http.routes.common import ERRORS, RequestCall, RequestLesson, ServerVersions, V1Route, get_sessions
from service.http.routes.sessions import TAGGED, PathId
from service.http.schemas import ActRequest, FeedbackRequest, PredictRequest
from service.turns.policy_turns import Policies, Told, Wish

router = APIRouter(prefix="/v1/sessions", route_class=V1Route, responses=ERRORS, tags=["Policies"])


async def get_policies(request: Request) -> Policies:
    """What can be asked of the policies."""
    return Policies(get_sessions(request))


ServerPolicies = Annotated[Policies, Depends(get_policies)]


@router.post("/{id}/act", summary="Act", responses=TAGGED)
async def act(session: PathId, body: ActRequest, policies: ServerPolicies, lesson: RequestLesson) -> Acted:
    """Learns the reward of the last action, or of the one named, and takes the next action."""
    told = None if body.reward is None else Told(body.reward, body.action_id, body.regret or 0.0)
    wish = Wish(body.temperature, body.seed)
    work = policies.act(lesson.call, session, body.model, body.observation, told, wish, if_match=lesson.if_match)
    done = await lesson.unless_left(work, body.on_disconnect)
    lesson.tag(done.adaptation.version_to)
    return Acted(object="action", **done.told())


@router.post("/{id}/feedback", summary="Reward an action, or tell what was kept of a completion", responses=TAGGED)
async def feedback(
    session: PathId,
    body: FeedbackRequest,
    policies: ServerPolicies,
    versions: ServerVersions,
    lesson: RequestLesson,
) -> Observed:
    """Learns the reward of an earlier action (`action_id`, `reward`), without taking another; or the text that a user
    kept of a completion (`completion_id`, `text`), behind its prompt if the session keeps texts (`keep_text`)."""
    if body.text is not None and body.completion_id is not None:
        answer = body.completion_id.rpartition("-")[2]
        work = versions.keep(lesson.call, session, answer, body.text, if_match=lesson.if_match)
    else:
        told = Told(body.reward or 0.0, body.action_id, body.regret or 0.0)
        work = policies.feedback(lesson.call, session, told, if_match=lesson.if_match)
    done = await lesson.unless_left(work, body.on_disconnect)
    lesson.tag(done.version)
    return Observed(**asdict(done))


@router.post("/{id}/predict", summary="Label an example")
async def predict(session: PathId, body: PredictRequest, policies: ServerPolicies, call: RequestCall) -> Labelled:
    """Labels an example with what the session has learned; learns nothing."""
    done = await policies.predict(call, session, body.model, body.features)
    return Labelled(object="label", **asdict(done))
