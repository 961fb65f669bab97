"""The routes, one file a subject; `ROUTERS` has every router that the server includes."""

from service.http.routes import (
    anthropic,
    conversations,
    embeddings,
    infill,
    ollama,
    openai,
    ops,
    page,
    policies,
    responses,
    sessions,
    tokens,
)

ROUTERS = (
    openai.router,
    responses.router,
    conversations.router,
    embeddings.router,
    ollama.router,
    anthropic.router,
    infill.router,
    tokens.router,
    sessions.router,
    sessions.files,
    policies.router,
    ops.router,
    page.router,
)
