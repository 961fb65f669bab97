"""The page, laboratory and dashboard: the server serves their files and no others, all local, under a strict policy."""

import hashlib
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from http.client import HTTPConnection
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from service.http.routes.page import FILES
from service.http.schemas import SESSION_ID
from tests.conftest import Server

PLAYGROUND = Path(str(files("service"))) / "playground"
SCRIPTS = sorted(PLAYGROUND.glob("*.js"))
ENTRIES = {"index.html": "conversation.js", "laboratory.html": "app.js", "dashboard.html": "dashboard.js"}
VENDORED = PLAYGROUND / "uplot"
EXAMPLES = Path(__file__).parents[2] / "examples"


class Elements(HTMLParser):
    """A parser that collects the start tags of a page with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url) as client:
        yield client


@pytest.fixture(scope="module", params=ENTRIES)
def document(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def elements(document: str) -> list[tuple[str, dict[str, str | None]]]:
    return Elements((PLAYGROUND / document).read_text()).tags


@pytest.mark.parametrize("path", FILES)
def test_a_file_is_served_with_its_type_and_the_policy(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    name, media_type = FILES[path]
    assert response.status_code == 200
    assert response.content == (PLAYGROUND / name).read_bytes()
    assert response.headers["content-type"].split(";")[0] == media_type
    policy = [directive.strip() for directive in response.headers["content-security-policy"].split(";")]
    assert {"default-src 'none'", "script-src 'self'", "connect-src 'self'"} < set(policy)
    assert not [directive for directive in policy if "unsafe" in directive or "*" in directive]
    assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("path", FILES)
def test_head_is_get_without_the_body(client: httpx.Client, path: str) -> None:
    varying = ("date", "x-request-id")
    get, head = client.get(path), client.head(path)
    assert head.status_code == 200 and not head.content
    assert [pair for pair in head.headers.items() if pair[0] not in varying] == [
        pair for pair in get.headers.items() if pair[0] not in varying
    ]


def test_a_browser_that_has_the_file_gets_a_304(client: httpx.Client) -> None:
    first = client.get("/")
    assert first.headers["cache-control"] == "no-cache"
    tag = first.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = client.get("/", headers={"If-None-Match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200


def test_the_page_accepts_reads_only(client: httpx.Client) -> None:
    response = client.post("/", json={})
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")


def test_a_page_of_another_site_changes_nothing_at_a_server_without_keys(client: httpx.Client) -> None:
    """A browser sends without asking only GET, HEAD and POST, and no type but these; before the rest it asks."""
    from_afar = {"Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    body = json.dumps({"model": "tiny", "prompt": "The fox", "text": "The fox", "session": "forged", "name": "forged"})
    simple = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", None)
    posts = [path for path, methods in client.get("/openapi.json").json()["paths"].items() if "post" in methods]
    assert len(posts) > 5
    for path in (path.replace("{id}", "forged") for path in posts):
        for content_type in simple:
            headers = from_afar | ({"Content-Type": content_type} if content_type else {})
            assert client.post(path, content=body, headers=headers).status_code == 415, (path, content_type)
        assert client.post(path, headers=from_afar).status_code in (400, 404, 422), path
        asked = from_afar | {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
        answer = client.options(path, headers=asked)
        assert not [name for name in answer.headers if name.startswith("access-control-")], path
    assert client.get("/v1/sessions/forged").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/index.html",
        "/playground",
        "/playground/",
        "/playground/index.html",
        "/laboratory/",
        "/laboratory.html",
        "/dashboard/",
        "/dashboard.html",
        "/playground/app.js/",
        "/playground//app.js",
        "/playground/uplot/SOURCE.json",
        "/playground/uplot",
        "/playground/../app.py",
        "/playground/%2e%2e/app.py",
        "/playground/..%2fapp.py",
        "/playground/..\\app.py",
        "/playground/app.js%00",
        "/playground//etc/passwd",
        "/playground/../../../../etc/passwd",
    ],
)
def test_nothing_else_can_be_reached(server: Server, path: str) -> None:
    address = urlsplit(server.url)
    connection = HTTPConnection(address.hostname or "", address.port)
    connection.request("GET", path)  # unchanged: httpx would normalise the path
    assert connection.getresponse().status == 404
    connection.close()


def test_every_file_that_the_page_refers_to_is_local_and_exists() -> None:
    links = {
        value
        for document in ENTRIES
        for _, attributes in Elements((PLAYGROUND / document).read_text()).tags
        for name, value in attributes.items()
        if name in ("src", "href", "action")
    }
    pages = {"./", "laboratory", "dashboard"}
    assert pages < links
    links -= pages
    for script in SCRIPTS:
        links |= {f"playground/{name}" for name in re.findall(r'from "\./([\w.]+)"', script.read_text())}
    fetched = {path for path in FILES if path.endswith((".txt", ".json"))}
    assert {f"/{link}" for link in links} | fetched == set(FILES) - {"/", "/laboratory", "/dashboard"}
    for file in (*SCRIPTS, *PLAYGROUND.glob("*.html"), *PLAYGROUND.glob("*.css")):
        assert not re.search(r"https?:|//\w|url\(|@import|\bimport\(", file.read_text()), file


def test_what_others_wrote_is_what_they_released() -> None:
    source = json.loads((VENDORED / "SOURCE.json").read_text())
    names = {file.name for file in VENDORED.iterdir()} - {"SOURCE.json"}
    assert names == set(source["files"])
    for name, checksum in source["files"].items():
        assert hashlib.sha256((VENDORED / name).read_bytes()).hexdigest() == checksum
    assert source["license"] == "MIT" and f"(v{source['version']})" in (VENDORED / "uPlot.iife.min.js").read_text()


def test_the_samples_are_the_examples() -> None:
    for sample in (PLAYGROUND / "samples").iterdir():
        assert sample.read_bytes() == (EXAMPLES / sample.name).read_bytes()


def test_the_page_needs_no_inline_code(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    assert all(attributes.get("src") for tag, attributes in elements if tag == "script")
    assert "style" not in [tag for tag, _ in elements]
    assert not [name for _, attributes in elements for name in attributes if name == "style" or name.startswith("on")]
    for script in SCRIPTS:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|\beval\b", script.read_text()), script


def test_script_and_page_agree_on_ids(document: str, elements: list[tuple[str, dict[str, str | None]]]) -> None:
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'\$\("([\w-]+)"\)', (PLAYGROUND / ENTRIES[document]).read_text())) <= set(ids)
    references = ("for", "aria-labelledby", "aria-describedby", "aria-controls")
    for _, attributes in elements:
        assert {id for name in references for id in (attributes.get(name) or "").split()} <= set(ids)


def test_the_laboratory_accepts_the_session_ids_that_the_server_accepts() -> None:
    """A `pattern` attribute is anchored implicitly, and its literal hyphen must be escaped."""
    elements = Elements((PLAYGROUND / "laboratory.html").read_text()).tags
    patterns = {attributes["pattern"] for _, attributes in elements if "pattern" in attributes}
    assert patterns == {SESSION_ID.removeprefix("^").removesuffix("$").replace("=-]", r"=\-]")}
