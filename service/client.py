"""A small HTTP client of the server, for the commands of `imprint`: every fault is one line for a person."""

import itertools
import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Self
from urllib.parse import quote

import httpx

Json = dict[str, Any]

ATTEMPTS = 6
LONGEST_WAIT_S = 30.0
# A long text may be learned for many minutes on a CPU before the answer comes.
TIMEOUT = httpx.Timeout(60, connect=5, read=3600)


class CommandError(Exception):
    """A command of the command line cannot be done. The message is one line that says why."""


class ClientError(CommandError):
    """The server cannot be reached, or refuses (`status`, `code`). The message is one line."""

    def __init__(self, message: str, *, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Client:
    """Talks to one server.

    A request refused with 429 or 503 is sent again after the `Retry-After` seconds, `ATTEMPTS` times in all, unless the
    server says that it would not help. `key` is the API key.
    """

    def __init__(
        self, url: str, *, key: str | None = None, on_wait: Callable[[str], None] = lambda reason: None
    ) -> None:
        self.url = url.rstrip("/")
        self._on_wait = on_wait
        try:
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            self._http = httpx.Client(base_url=self.url, timeout=TIMEOUT, headers=headers)
        except UnicodeEncodeError:
            raise ClientError("the API key holds characters that no key has") from None
        except httpx.InvalidURL as error:
            raise ClientError(f"--url must be an http:// address, got {url!r}: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._http.close()

    def model(self) -> str:
        """The name of the served model."""
        return str(self._json("GET", "/v1/models", "data")["data"][0]["id"])

    def chat(self, body: Json) -> Iterator[Json]:
        """The chunks of a streamed chat completion, as they arrive."""
        with self._send("POST", "/v1/chat/completions", {**body, "stream": True}) as response:
            for data in sse_data(response.iter_bytes()):
                if data == "[DONE]":
                    return
                chunk: Json = json.loads(data)
                if "error" in chunk:
                    raise ClientError(chunk["error"]["message"], code=chunk["error"].get("code"))
                if "choices" not in chunk:
                    raise KeyError("choices")
                yield chunk
        raise ClientError(f"{self.url} closed the stream before the answer was complete")

    def observe(self, session: str, text: str) -> Json:
        """Learn `text`; the answer of `POST /v1/sessions/{id}/observe`."""
        return self._learn(session, "observe", {"text": text}, "tokens_learned", "rows_written", "loss")

    def score(self, session: str, text: str, *, learn: bool) -> Json:
        """Score `text` in nats, then learn it if asked; the answer of `POST /v1/sessions/{id}/score`."""
        fields = ("logprobs", "frozen_logprobs", "version")
        if learn:
            return self._learn(session, "score", {"text": text, "learn": True}, *fields)
        return self._json("POST", f"{_path(session)}/score", *fields, body={"text": text})

    def session(self, session: str) -> Json:
        """What the server tells about a session."""
        return self._json("GET", _path(session), "version")

    def delete(self, session: str) -> None:
        """Erase a session."""
        with self._send("DELETE", _path(session)):
            pass

    def sessions(self) -> Iterator[Json]:
        """All sessions, ordered by id, fetched page by page."""
        path = "/v1/sessions"
        while True:
            page = self._json("GET", path, "data", "next")
            yield from page["data"]
            if page["next"] is None:
                return
            path = f"/v1/sessions?after={quote(page['next'], safe='')}"

    def _learn(self, session: str, action: str, body: Json, *fields: str) -> Json:
        """A request that learns once, however often it has to be sent."""
        return self._json("POST", f"{_path(session)}/{action}", "version", *fields, body=body, key=uuid.uuid4().hex)

    def _json(self, method: str, path: str, *fields: str, body: Json | None = None, key: str | None = None) -> Json:
        """The JSON answer to one request, which has `fields`."""
        with self._send(method, path, body, key) as response:
            answer: Json = json.loads(response.read())
            if missing := set(fields) - answer.keys():
                raise KeyError(*missing)
            return answer

    @contextmanager
    def _send(
        self, method: str, path: str, body: Json | None = None, key: str | None = None
    ) -> Iterator[httpx.Response]:
        """The answer to one request, not yet read; the whole exchange speaks `ClientError`."""
        try:
            response = self._accepted(method, path, body, key)
            try:
                yield response
            finally:
                response.close()
        except httpx.ConnectError:
            raise ClientError(f"no Imprint server answers at {self.url}: start one with `imprint serve`") from None
        except httpx.TimeoutException:
            raise ClientError(f"{self.url} did not answer in time") from None
        except httpx.UnsupportedProtocol:
            raise ClientError(f"--url must start with http:// or https://, got {self.url!r}") from None
        except httpx.HTTPError as error:
            raise ClientError(f"the connection to {self.url} broke: {error}") from None
        except UnicodeEncodeError as error:
            raise ClientError(f"the text is not valid Unicode: {error.reason}") from None
        except (ValueError, KeyError, AttributeError):
            raise ClientError(f"{self.url} answered, but not as an Imprint server does") from None

    def _accepted(self, method: str, path: str, body: Json | None, key: str | None) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        for attempt in itertools.count(1):
            request = self._http.build_request(method, path, json=body, headers=headers)
            response = self._http.send(request, stream=True)
            if response.is_success:
                break
            refusal = _refusal(response)
            final = response.headers.get("x-should-retry") == "false"
            if response.status_code not in (429, 503) or final or attempt == ATTEMPTS:
                raise refusal
            wait = _retry_after(response)
            self._on_wait(f"{refusal}; trying again in {wait:g} s")
            time.sleep(wait)
        return response


def sse_data(chunks: Iterable[bytes]) -> Iterator[str]:
    """The `data` fields of a server-sent event stream.

    Lines end at newlines only: httpx's own line iterator would cut at U+2028 inside the JSON, too.
    """
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()


def _path(session: str) -> str:
    if session in ("", ".", ".."):
        raise ClientError(f"a session id starts with a letter or a digit, got {session!r}")
    return f"/v1/sessions/{quote(session, safe='')}"


def _refusal(response: httpx.Response) -> ClientError:
    """What a refused request says, in OpenAI's error shape or, from a proxy in between, any other."""
    try:
        error = json.loads(response.read())["error"]
        return ClientError(str(error["message"]), status=response.status_code, code=error.get("code"))
    except (ValueError, KeyError, TypeError, AttributeError):
        line = f"{response.url} answered {response.status_code} {response.reason_phrase}".rstrip()
        return ClientError(line, status=response.status_code)
    finally:
        response.close()


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(max(float(response.headers["Retry-After"]), 0.0), LONGEST_WAIT_S)
    except (KeyError, ValueError):
        return 1.0
