"""The dashboard's files: served as what they are, under a strict policy, and nothing else is."""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from html.parser import HTMLParser
from importlib import resources

import httpx
import pytest
from fastapi import FastAPI

from arriero.dashboard.app import attach_dashboard

ASSETS = {p.name: p.read_text(encoding="utf-8") for p in (resources.files("arriero.dashboard") / "static").iterdir()}
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
SVG_NAMESPACE = "http://www.w3.org/2000/svg"  # a name, never fetched


async def get(path: str, *, method: str = "GET", **options: object) -> httpx.Response:
    app = FastAPI()
    attach_dashboard(app)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
        return await client.request(method, path, **options)  # type: ignore[arg-type]


class _Page(HTMLParser):
    """What a page refers to, and what it has inline."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.inline: list[str] = []
        self._in_script = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self._in_script = tag in ("script", "style")
        self.links += [v for k, v in attrs if k in ("src", "href") and v is not None]
        self.inline += [f"<{tag} {k}>" for k in given if k == "style" or k.startswith("on")]
        if given.get("id"):
            self.ids.add(str(given["id"]))

    def handle_data(self, data: str) -> None:
        if self._in_script and data.strip():
            self.inline.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False


@pytest.fixture(scope="module")
def page() -> _Page:
    parser = _Page()
    parser.feed(ASSETS["index.html"])
    return parser


async def test_the_page_is_html_and_needs_no_key() -> None:
    response = await get("/dashboard")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.text == ASSETS["index.html"]


@pytest.mark.parametrize("name", sorted(ASSETS))
async def test_each_file_has_its_type(name: str) -> None:
    response = await get(f"/dashboard/{name}")
    assert response.status_code == 200
    assert response.headers["content-type"].partition(";")[0] == TYPES[name.rpartition(".")[2]]
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.text == ASSETS[name]


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/dashboard.js", "/dashboard/icon.svg"])
async def test_the_policy_lets_nothing_in_from_elsewhere_and_nothing_inline(path: str) -> None:
    policy = dict(d.strip().split(" ", 1) for d in (await get(path)).headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'self'"
    assert {policy[name] for name in ("base-uri", "form-action", "frame-ancestors", "object-src")} == {"'none'"}
    assert "unsafe" not in str(policy)


async def test_a_slash_at_the_end_leads_to_the_page() -> None:
    """The page's links are relative, so that they hold behind a proxy's prefix; under /dashboard/ they would not."""
    response = await get("/dashboard/")
    assert response.status_code == 307
    assert response.headers["location"] == "http://front/dashboard"


@pytest.mark.parametrize(
    "path",
    [
        "/dashboard/app.py",
        "/dashboard/static",
        "/dashboard/static/index.html",
        "/dashboard/.",
        "/dashboard/..",
        "/dashboard/../app.py",
        "/dashboard/../../__init__.py",
        "/dashboard/..\\app.py",
        "/dashboard//etc/passwd",
        "/dashboard/static/../../app.py",
        "/dashboard/index.html\0.css",
    ],
)
async def test_a_path_out_of_the_folder_is_not_found(path: str) -> None:
    """As a server hands them over, percent-decoded: a client would take the dots out first."""
    statuses = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, object]) -> None:
        statuses.append(message.get("status", 0))

    app = FastAPI()
    attach_dashboard(app)
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": [], "root_path": ""}
    await app(scope, receive, send)
    assert statuses[0] == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_the_files_are_read_only(method: str) -> None:
    assert (await get("/dashboard", method=method)).status_code == 405


async def test_the_page_is_no_part_of_the_api() -> None:
    assert (await get("/openapi.json")).json()["paths"] == {}


@pytest.mark.parametrize("name", sorted(ASSETS))
def test_no_file_names_another_server(name: str) -> None:
    text = ASSETS[name].replace(SVG_NAMESPACE, "")
    assert re.findall(r"(?:https?:|wss?:|[\"'(=]\s*)//[^\s\"')]+", text) == []
    assert "@import" not in text


@pytest.mark.parametrize("name", sorted(n for n in ASSETS if n.endswith(".js")))
def test_data_never_becomes_markup_or_code(name: str) -> None:
    banned = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser"
    assert re.findall(banned, ASSETS[name]) == []


def test_the_page_has_nothing_inline_that_the_policy_would_block(page: _Page) -> None:
    assert page.inline == []


def test_every_file_that_is_named_is_there(page: _Page) -> None:
    linked = {link.removeprefix("dashboard/") for link in page.links}
    imported = {n for text in ASSETS.values() for n in re.findall(r'from "\./([^"]+)"', text)}
    assert {"dashboard.js", "dashboard.css"} <= linked
    assert linked | imported | {"index.html"} == set(ASSETS)


def test_every_element_that_the_script_looks_up_is_in_the_page(page: _Page) -> None:
    wanted = set(re.findall(r'\bat\("([a-z-]+)"\)', ASSETS["dashboard.js"]))
    assert len(wanted) > 10
    assert wanted <= page.ids
