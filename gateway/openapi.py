"""What the OpenAPI document says beyond FastAPI's own: errors, RPC names, keys; and /docs from local files.

The page and all it loads come from this process: Swagger UI's files ship in the wheel `fastapi-swagger`, and the
page's Content-Security-Policy lets a browser load nothing from elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Path, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse

from gateway import resources
from gateway.access import HEALTH_PATH
from gateway.problems import MEDIA_TYPE, Problem, title_of

# What any call may answer: malformed, without a key, from a foreign host, too long, and a failing or absent server.
_COMMON = (400, 401, 403, 422, 500, 503, 504)
JSON_BODY = (413, 415)
"""What a route with a JSON body may answer besides."""

AnyModel = Annotated[
    str, Path(alias="id", description="`base`, a model's name (its newest ready version), or `name:3`.")
]

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SCHEMA_PREFIX = "#/components/schemas/"


def errors(*statuses: int, only: Sequence[int] = ()) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: the problems it answers, the common ones and `statuses`, or `only` these."""
    content = {MEDIA_TYPE: {"schema": {"$ref": f"{_SCHEMA_PREFIX}Problem"}}}
    return {
        status: {"description": title_of(status), "content": content}
        for status in sorted(only or {*_COMMON, *statuses})
    }


def rpc(name: str, **extra: Any) -> dict[str, Any]:
    """`openapi_extra=` of a route: the RPC it serves, as `JobService.GetJob`."""
    return {"x-rpc": name, **extra}


def install(app: FastAPI, *, with_keys: bool) -> None:
    """Adds `/docs`, its files, and the document's shared parts to `app`."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
                tags=app.openapi_tags,
            )
            _add_schemas(schema)
            if with_keys:
                _demand_key(schema)
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        page = get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-32x32.png",
            # Without null the page would send the document's address to a public validator.
            swagger_ui_parameters={"validatorUrl": None},
        )
        page.headers["Content-Security-Policy"] = _POLICY
        return page

    @app.get("/docs/{asset}", include_in_schema=False)
    async def docs_asset(asset: str) -> Response:
        if asset not in _ASSETS:
            return Response(status_code=404)
        content = files("fastapi_swagger").joinpath("resources", asset).read_bytes()
        return Response(content, media_type=_ASSETS[asset], headers={"Cache-Control": "max-age=3600"})


def _add_schemas(schema: dict[str, Any]) -> None:
    """The bodies that are sent without a response model: problems and events."""
    shared = schema.setdefault("components", {}).setdefault("schemas", {})
    for model in (Problem, resources.JobEvent):
        definition = model.model_json_schema(ref_template=_SCHEMA_PREFIX + "{model}")
        for name, part in definition.pop("$defs", {}).items():
            shared.setdefault(name, part)
        shared[model.__name__] = definition


def _demand_key(schema: dict[str, Any]) -> None:
    schema["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    }
    schema["security"] = [{"bearer": []}, {"header": []}]
    schema["paths"][HEALTH_PATH]["get"]["security"] = []
