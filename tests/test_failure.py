"""From the errors of SDKs to the status and the sentence for the client."""

import builtins
import json
from typing import Any

import httpx
import openai
import pytest
import requests
from fastapi import HTTPException
from starlette.exceptions import HTTPException as StarletteHTTPException

from production.failure import BUSY, FAILED, NO_CREDENTIALS, NO_RETRY, REFUSED, TOO_LATE, as_http_exception

KEY, TOLD = "sk-test-0123456789abcdef", "You asked too much, 5 < 6 {braces} included."
BODY = {"message": TOLD}
KEYS = {"Authorization": f"Bearer {KEY}", "api-key": "azurekey", "x-api-key": "anthropic", "X-Goog-Api-Key": "shorter"}
REQUEST: Any = httpx.Request("POST", "http://llm", headers=KEYS)


def shaped(**attributes: Any) -> Exception:
    """Return an error that has these attributes, as an SDK's that is not installed here."""
    error = Exception("llm at /opt/models")
    vars(error).update(attributes)
    return error


def answered(status: int, body: Any = BODY) -> Any:
    content = body if isinstance(body, str) else json.dumps(body)
    return httpx.Response(status, headers={"Retry-After": "7"}, content=content, request=REQUEST)


def errors_of_sdks(status: int) -> dict[str, Exception]:
    response, of_requests = answered(status), requests.Response()
    request = requests.Request("POST", "http://llm", {"Authorization": KEY.encode()}).prepare()
    vars(of_requests).update(status_code=status, _content=response.content, headers=response.headers, request=request)
    errors = {
        "openai": openai.APIStatusError("Error code", response=response, body=BODY),
        "httpx": httpx.HTTPStatusError("", request=REQUEST, response=response),
        "requests": requests.HTTPError(response=of_requests),
        "ollama": shaped(status_code=status, error=TOLD),
        "botocore": shaped(response={"Error": {"Message": TOLD}, "ResponseMetadata": {"HTTPStatusCode": status}}),
        "google": shaped(code=status, message="400 INVALID_ARGUMENT", response=response),
        "cohere": shaped(status_code=status, headers={"retry-after": "7"}, body=BODY),
    }
    errors["ollama"].__context__, errors["ollama"].__suppress_context__ = errors["httpx"], True  # raised `from None`
    return errors


def outcome(error: BaseException, *causes: BaseException) -> tuple[int, str, Any]:
    """Return what a client gets for an error of a component that streams; each cause is that of the one before."""
    pipeline_error = RuntimeError("component_name: 'llm'")
    for effect, cause in zip((pipeline_error, error, *causes), (error, *causes), strict=False):
        effect.__cause__ = cause
    failure = as_http_exception(pipeline_error, [error])
    return failure.status_code, failure.detail, failure.headers


BAD, LATE, DENIED = (502, FAILED, None), (504, TOO_LATE, None), (400, NO_CREDENTIALS, NO_RETRY)


@pytest.mark.parametrize(
    ("statuses", "expected"),
    [
        ((400, 422), (400, TOLD, None)),
        ((401, 403), DENIED),
        ((402, 404, 405, 413, 418, 451, 499), (400, REFUSED, NO_RETRY)),
        ((429, 503, 529), (429, BUSY, {"Retry-After": "7"})),
        ((408, 504), LATE),
        ((409, 500, 501, 502, 520, 200, 302, 600), BAD),
    ],
)
def test_each_status_of_each_sdk(statuses: tuple[int, ...], expected: Any) -> None:
    for status in statuses:
        found = {sdk: outcome(error) for sdk, error in errors_of_sdks(status).items()}
        if expected[0] == 429:
            assert found.pop("botocore") == (429, BUSY, None)
        assert found == dict.fromkeys(found, expected)


EXTRA = [{"type": "extra_forbidden", "loc": ["body", "stop"], "msg": TOLD, "input": {"include_usage": True}}]
HOSTILE = type("HostileError", (Exception,), {"status_code": property(lambda self: 1 / 0)})()
NO_KEY, AGAIN, CIRCLE = errors_of_sdks(401)["httpx"], errors_of_sdks(401)["httpx"], RuntimeError()
GROUP: Any = getattr(builtins, "ExceptionGroup", lambda _, errors: shaped(exceptions=errors))  # Python 3.10 has none
ODD: list[Any] = ["400", {}, [400], {"ResponseMetadata": {}}, len, None]
OWN = (503, "no such tenant", {"X-Tea": "yes"})


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        *(([error], LATE) for error in (TimeoutError(), httpx.ReadTimeout(""), requests.ConnectTimeout())),
        *(([error], BAD) for error in (httpx.ConnectError(""), requests.ConnectionError(), ValueError("400"))),
        *(([openai.APITimeoutError(REQUEST)], LATE), ([openai.APIConnectionError(request=REQUEST)], BAD)),
        *(([shaped(**{name: odd})], BAD) for name in ("status_code", "code", "response") for odd in ODD),
        *(([HOSTILE], BAD), ([RuntimeError(), SystemExit(404)], BAD)),
        *(([ValueError(), KeyError(), NO_KEY], DENIED), ([ValueError(), TimeoutError(), NO_KEY], LATE)),
        *(([CIRCLE, AGAIN, CIRCLE], DENIED), ([CIRCLE, ValueError(), CIRCLE], BAD)),
        ([GROUP("", [ValueError(), GROUP("", [NO_KEY])])], DENIED),
        *(([ValueError(), kind(*OWN)], OWN) for kind in (HTTPException, StarletteHTTPException)),
    ],
)
def test_errors_without_a_status_and_with_causes(errors: list[BaseException], expected: Any) -> None:
    assert outcome(*errors) == expected


@pytest.mark.parametrize("error", [NO_KEY, errors_of_sdks(400)["openai"], TimeoutError(), HTTPException(418, FAILED)])
def test_a_component_that_does_not_stream_can_only_raise_an_http_exception(error: Exception) -> None:
    pipeline_error = RuntimeError("component_name: 'retriever'")
    pipeline_error.__cause__ = error
    status = 418 if isinstance(error, HTTPException) else 502
    for failure in (as_http_exception(pipeline_error, [ValueError()]), as_http_exception(error)):
        assert (failure.status_code, failure.detail) == (status, FAILED)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        *(({name: TOLD}, TOLD) for name in ("error", "message", "detail", "msg")),
        *(({name: {"detail": EXTRA}}, f"stop: {TOLD}") for name in ("error", "message")),
        ([{"error": {"code": 400, "message": TOLD}}], TOLD),
        ({"success": False, "errors": [{"code": 7003, "message": TOLD}], "result": None}, TOLD),
        ({"message": TOLD * 100}, (TOLD * 100)[:1000]),
        ({"message": f"half \ud83d of {KEY}, {KEY}"}, "half \ufffd of [key], [key]"),
        ({"message": "anthropic or azurekey, no shorter ones"}, "[key] or [key], no shorter ones"),
        ({"message": "x" * 990 + KEY}, "x" * 990 + "[key]"),
        *((dump, REFUSED) for dump in (TOLD, f'"{TOLD}"', "<html>Bad</html>", {"message": "<!DOCTYPE html>"})),
        *((body, REFUSED) for body in list[Any]([5, ["x"], {"a": "b"}, {"error": {"code": "x"}}, {"message": 5}])),
    ],
)
def test_only_what_the_upstream_wrote_for_a_person_is_passed_on(body: Any, detail: str) -> None:
    assert outcome(shaped(status_code=400, response=answered(400, body))) == (400, detail, None)
