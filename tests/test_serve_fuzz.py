"""Whatever is sent, the answer is an answer or an error of the client's: the HTTP layer over a fake engine."""

import json

import pytest

pytest.importorskip("httpx")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_serve_http import CHAT, HELLO, ONCE, SCORE, TEXTS, Server, session  # noqa: F401

VALUES = st.recursive(
  st.none()
  | st.booleans()
  | st.integers(-(2**70), 2**70)
  | st.floats()
  | st.text(max_size=8)
  | st.sampled_from(["auto", "user", "plain", "\ud800", "json_object", 0.5, 1, 5, []]),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
  ),
  max_leaves=6,
)
BODIES = {
  CHAT: HELLO | {"max_tokens": 3},
  TEXTS: ONCE | {"max_tokens": 3},
  SCORE: {"prefix": "a", "items": ["b"], "label_token_ids": [5]},
  "/tokenize": {"prompt": "a"},
  "/detokenize": {"tokens": [5]},
}


@pytest.fixture(scope="module")
def server(session):  # noqa: F811
  return Server(session)


def fields(route):
  """Names that a body of this route has, and one that none has."""
  from entropix_jax.serve import schema

  document = schema.document("0")
  ref = document["paths"][route]["post"]["requestBody"]["content"]["application/json"]["schema"]
  own = document["components"]["schemas"][ref["$ref"].rsplit("/", 1)[1]]["properties"]
  return [*own, "response_format", "tools", "structured_outputs", "unknown"]


@pytest.mark.parametrize("route", BODIES)
def test_no_body_makes_the_server_fail(server, route):
  @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
  @given(st.dictionaries(st.sampled_from(fields(route)), VALUES, max_size=3))
  def whatever(change):
    body = BODIES[route] | change
    if body.get("n") is not None and isinstance(body["n"], int) and body["n"] > 4:
      body["n"] = 4
    answer = server(route, json.dumps(body).encode("utf-8", "surrogatepass"))
    assert answer.status_code in (200, 400, 404, 503), (body, answer.text)
    if answer.status_code != 200:
      error = answer.json()["error"]
      assert error.keys() == {"message", "type", "param", "code"}
      assert "Traceback" not in error["message"]

  whatever()


@pytest.mark.parametrize("route", BODIES)
def test_no_bytes_make_the_server_fail(server, route):
  @settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
  @given(st.binary(max_size=40) | st.text(max_size=40).map(lambda s: s.encode("utf-8", "replace")))
  def whatever(data):
    assert server(route, data).status_code == 400

  whatever()


def test_the_schema_that_is_served_holds_what_it_says(server):
  schemathesis = pytest.importorskip("schemathesis")
  found = schemathesis.openapi.from_asgi("/openapi.json", server.app)

  for operation in found.get_all_operations():

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operation.ok().as_strategy())
    def call(case):
      if isinstance(case.body, dict) and isinstance(case.body.get("n"), int):
        case.body["n"] = min(case.body["n"], 4)
      answer = server(case.path, json.dumps(case.body).encode("utf-8", "surrogatepass"))
      assert answer.status_code < 500 or answer.status_code == 503, (case.body, answer.text)

    call()
