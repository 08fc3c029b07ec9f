"""Every route of labeling is refused without the right credentials: pages, forms and the API."""

from datetime import UTC, datetime, timedelta

import pytest
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient

from trimtab.labeling.config import LabelingConfig
from trimtab.labeling.database import Database
from trimtab.labeling.labelers import add_labeler, disable_labeler, find_labeler, renew_token
from trimtab.labeling.sessions import start_session
from trimtab.labeling.vocabulary import Role
from trimtab.labeling.web.app import create_app
from trimtab.labeling.web.room import SESSION_COOKIE, Room

NOW = datetime(2026, 11, 23, 9, 0, tzinfo=UTC)
API = "/api/v1"
PUBLIC = {"GET /sign-in", "POST /sign-in", "GET /choose", "GET /healthz", f"GET {API}/openapi.json"}
ADMINS = ("/people", f"{API}/labelers")
LEADS = {f"POST {API}/campaigns", f"PATCH {API}/campaigns/{{name}}", f"GET {API}/labelers"}
REPORTS = ("rows", "progress", "agreement", "labelers", "win-rates")


def needs(route: str) -> Role:
    """Which role a route wants."""
    path = route.split()[1]
    about_a_campaign = path.startswith(f"{API}/campaigns/{{name}}/") and path.endswith(REPORTS)
    if route in LEADS or path.startswith("/lead") or about_a_campaign:
        return Role.LEAD
    return Role.ADMIN if path.startswith(ADMINS) else Role.LABELER


@pytest.fixture(scope="module")
def database(tmp_path_factory):
    opened = Database(str(tmp_path_factory.mktemp("access") / "labels.sqlite"))
    opened.migrate()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def app(database):
    return create_app(Room(database, LabelingConfig(), lambda: NOW))


@pytest.fixture(scope="module")
def tokens(database) -> dict[str, str]:
    """By role, and of those who may not come in any more."""
    with database.write() as session:
        found = {role: add_labeler(session, f"a-{role}", role, NOW)[1] for role in Role}
        found["renewed"] = add_labeler(session, "renewed", Role.ADMIN, NOW)[1]
        renew_token(session, "renewed")
        found["disabled"] = add_labeler(session, "disabled", Role.ADMIN, NOW)[1]
        disable_labeler(session, "disabled", NOW)
    return found


def routes(app) -> list[str]:
    """ "METHOD /path" of every route; static files, which are the same for everybody, are mounted beside them."""
    found = [f"{method} {path}" for path, methods in _paths(app) for method in sorted(methods - {"HEAD"})]
    return [route for route in found if route not in PUBLIC]


def _paths(app):
    described = {(route.path, frozenset(route.methods)) for route in app.routes if isinstance(route, APIRoute)}
    nested = [getattr(route, "original_router", None) for route in app.routes]
    for router in filter(None, nested):
        described |= {(route.path, frozenset(route.methods)) for route in router.routes if isinstance(route, APIRoute)}
    return sorted(described)


def outcomes(app, token: str | None = None, cookie: str | None = None) -> dict[str, object]:
    """Of each route: 401, 403 where the role is what lacks, or "open"."""
    headers = {"accept": "application/json"} | ({"authorization": f"Bearer {token}"} if token is not None else {})
    client = TestClient(app, headers=headers, follow_redirects=False, raise_server_exceptions=False)
    if cookie is not None:
        client.cookies.set(SESSION_COOKIE, cookie)
    found: dict[str, object] = {}
    for route in routes(app):
        method, path = route.split()
        answer = client.request(method, path.replace("{name}", "nobody").replace("{task_id}", "999999"))
        assert answer.status_code < 500, (route, answer.text)
        lacks = answer.status_code == 403 and "needs the role" in answer.text
        found[route] = answer.status_code if lacks or answer.status_code == 401 else "open"
    return found


def everywhere(app, outcome: object) -> dict[str, object]:
    return dict.fromkeys(routes(app), outcome)


def test_the_routes_are_found(app):
    assert len(routes(app)) > 40 and {needs(route) for route in routes(app)} == set(Role)


def test_no_wrong_or_withdrawn_credentials_open_nothing(app, tokens):
    assert outcomes(app) == everywhere(app, 401)
    for what in ("made-up", "", tokens["renewed"], tokens["disabled"], tokens[Role.ADMIN][:-1]):
        assert outcomes(app, what) == everywhere(app, 401), what


def test_a_session_that_has_expired_opens_nothing(app, database, tokens):
    with database.write() as session:
        admin = find_labeler(session, f"a-{Role.ADMIN}")
        over = start_session(session, admin, NOW - timedelta(hours=2), timedelta(hours=1))
        going_on = start_session(session, admin, NOW, timedelta(hours=1))
    assert outcomes(app, cookie=over) == everywhere(app, 401)
    assert outcomes(app, cookie="made-up") == everywhere(app, 401)
    assert outcomes(app, cookie=going_on) == everywhere(app, "open")


@pytest.mark.parametrize("role", Role)
def test_a_role_opens_what_it_includes_and_no_more(app, tokens, role):
    expected = {route: "open" if role.includes(needs(route)) else 403 for route in routes(app)}
    assert outcomes(app, tokens[role]) == expected
