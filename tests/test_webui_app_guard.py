"""Laws of who may ask: host names, origins, the token, where the server may listen."""

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from attnlab_webui.guard import Guard, check_bind, guard_from_settings, is_loopback

TOKEN = "correct horse battery staple"


def client_of(guard: Guard, base: str = "http://127.0.0.1:8000") -> TestClient:
    app = FastAPI()

    @app.get("/api/v1/health")
    def health():
        return {"status": "ok"}

    @app.api_route("/thing", methods=["GET", "POST"])
    def thing():
        return {"secret": 1}

    guard.install(app)
    return TestClient(app, base_url=base, follow_redirects=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_token(host):
    assert is_loopback(host)
    check_bind(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "lab.example.org", ""])
def test_listening_for_others_needs_a_token(host, monkeypatch):
    with pytest.raises(ValueError, match=r"host must be a loopback address.*ATTNLAB_TOKEN"):
        check_bind(host)
    monkeypatch.setenv("ATTNLAB_TOKEN", TOKEN)
    check_bind(host)


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost", "LOCALHOST:7860", "[::1]:80"])
def test_our_own_host_names_are_answered(host):
    assert client_of(Guard()).get("/thing", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.1.7"]
)
def test_a_rebound_host_name_is_refused(host):
    answer = client_of(Guard()).get("/thing", headers={"host": host})
    assert answer.status_code == 400
    assert host in answer.json()["error"]


def test_more_host_names_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("ATTNLAB_WEB_HOSTS", "lab.example.org, Other.example")
    client = client_of(guard_from_settings())
    assert client.get("/thing", headers={"host": "lab.example.org:443"}).status_code == 200
    assert client.get("/thing", headers={"host": "other.example"}).status_code == 200
    assert client.get("/thing", headers={"host": "third.example"}).status_code == 400


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "http://127.0.0.1:9999", "null", "http://localhost:8000"]
)
@pytest.mark.parametrize("method", ["get", "post"])
def test_another_origin_is_refused(origin, method):
    answer = getattr(client_of(Guard()), method)("/thing", headers={"origin": origin})
    assert answer.status_code == 403
    assert "Origin must be this server" in answer.json()["error"]


def test_our_own_origin_is_answered():
    answer = client_of(Guard()).post("/thing", headers={"origin": "http://127.0.0.1:8000"})
    assert answer.status_code == 200
    assert "access-control-allow-origin" not in answer.headers


def test_every_answer_carries_the_security_headers():
    client = client_of(Guard())
    for answer in (
        client.get("/thing"),
        client.get("/missing"),
        client.get("/thing", headers={"host": "x.example"}),
    ):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'self'" in policy
        assert "connect-src 'self'" in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "same-origin"


@pytest.mark.parametrize(
    "given", [None, "Bearer wrong", "Bearer ", "Basic abc", "Bearer " + TOKEN[:-1], TOKEN]
)
def test_without_the_token_nothing_is_answered_but_the_health_check(given):
    client = client_of(Guard(token=TOKEN))
    headers = {"authorization": given} if given else {}
    answer = client.get("/thing", headers=headers)
    assert answer.status_code == 401
    assert "secret" not in answer.text
    assert "token is required" in answer.json()["error"]
    assert client.get("/api/v1/health", headers=headers).status_code == 200


def test_the_bearer_token_opens_everything_from_any_host():
    client = client_of(Guard(token=TOKEN), base="http://lab.example.org")
    assert client.get("/thing", headers={"authorization": f"Bearer {TOKEN}"}).json() == {"secret": 1}


def test_a_browser_is_led_to_the_sign_in_form_and_back_to_where_it_wanted():
    client = client_of(Guard(token=TOKEN))
    asked = client.get("/thing?runs=3,7&layer=5", headers={"accept": "text/html"})
    assert asked.status_code == 303
    form = client.get(asked.headers["location"])
    assert form.status_code == 200
    assert 'type="password"' in form.text
    wrong = client.post(asked.headers["location"], data={"token": "guess"})
    assert wrong.status_code == 403
    assert "set-cookie" not in wrong.headers
    right = client.post(asked.headers["location"], data={"token": TOKEN})
    assert right.headers["location"] == "/thing?runs=3,7&layer=5"
    cookie = right.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert TOKEN not in cookie
    assert client.get("/thing").json() == {"secret": 1}


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example/",
        "//evil.example",
        "/\\evil.example",
        "javascript:alert(1)",
        "/a\r\nSet-Cookie: x=1",
    ],
)
def test_signing_in_never_leads_away_from_this_server(target):
    client = client_of(Guard(token=TOKEN))
    answer = client.post("/sign-in", params={"next": target}, data={"token": TOKEN})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/"


def test_a_cookie_of_another_token_is_worth_nothing():
    client = client_of(Guard(token=TOKEN))
    client.cookies.set("attnlab_session", Guard(token="another").session())
    assert client.get("/thing").status_code == 401
