"""The page to watch the cluster: static files; what they show comes from the admin API."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources

from fastapi import FastAPI, HTTPException, Response

PAGE = "index.html"
MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    # Nothing from elsewhere, nothing inline: a request id with markup in it has nothing to run.
    "content-security-policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def attach_dashboard(app: FastAPI) -> None:
    """Add ``GET /dashboard`` and its files to ``app``.

    They are public even if the server has API keys: they hold no data, and the page sends the key with
    every call to the admin API.
    """
    assets = _read_assets()

    @app.get("/dashboard", include_in_schema=False)
    async def page() -> Response:
        return _respond(assets, PAGE)

    @app.get("/dashboard/{asset}", include_in_schema=False)
    async def asset(asset: str) -> Response:
        return _respond(assets, asset)


def _respond(assets: Mapping[str, bytes], name: str) -> Response:
    """The asset called ``name``. Raises HTTPException 404: only names read at start are ever looked up."""
    content = assets.get(name)
    if content is None:
        raise HTTPException(404, f"the dashboard has no file {name!r}")
    return Response(content, media_type=MEDIA_TYPES[_suffix(name)], headers=HEADERS)


def _read_assets() -> dict[str, bytes]:
    """All files of the page by name: some tens of kB, so that no request touches the disk."""
    folder = resources.files("arriero.dashboard") / "static"
    return {f.name: f.read_bytes() for f in folder.iterdir() if _suffix(f.name) in MEDIA_TYPES}


def _suffix(name: str) -> str:
    return name[name.rfind(".") :]
