"""The HTTP edge: middleware, routes, and the bodies of requests and replies. No turn, store or tensor is handled here.

The way of a request: `middleware.py` → `json_route.py` → a function in `routes/`, which gets its arguments from
`dependencies.py` and `schemas.py`, calls `service/turns` or `service/versions`, and returns a model of `replies.py`, or
an `EventStream` (`sse.py`) of the chunks of `response_formats.py`. Errors become answers in `error_responses.py`.
`install.py` assembles the parts.

How to add a route:

1. `routes/<subject>.py`: the route function. Its name is the operation id, its docstring is the description. A new
   subject's router also goes into `ROUTERS` of `routes/__init__.py`.
2. `schemas.py`: the body of the request, with an example; `queries.py`: the parameters of a query. A rule about several
   fields also goes into `field_rules.py`, which describes the rule in JSON Schema.
3. `replies.py`: the body of the reply.
4. `openapi_examples.py`: an example of the reply, under the name of its class.
5. `tests/service/`: a test. `test_openapi.py` checks the words and the examples of every route without being changed,
   and `tests/fuzz_http.py` compares server and description.

Then print the page of the routes anew: `.venv/bin/python -m service.http.reference > docs/http.md`.
"""
