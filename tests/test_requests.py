"""Requests are parsed once, and nothing in them is passed over in silence."""

from __future__ import annotations

import math
from typing import Any

import pytest

from myllm.errors import UsageError
from myllm.requests import OPERATIONS, EmbedRequest, GenRequest, LoadOptions, Request


def test_a_request_is_its_operation_its_model_and_what_is_asked_of_that() -> None:
    message = {
        "op": "gen",
        "model": "m",
        "options": {"context": 64},
        "offline": True,
        "prompt": "x",
        "top_k": 3,
    }
    request = Request.parse({**message, "keep_alive": -1, "pin": True})
    assert (request.op, request.model.name, request.model.offline) == ("gen", "m", True)
    assert request.model.options == LoadOptions(context=64)
    assert request.model.wishes == (math.inf, True)
    assert isinstance(request.asked, GenRequest)
    assert request.asked.sampling == {"top_k": 3}
    assert request.wire == {"prompt": "x", "top_k": 3}
    embed = Request.parse({"op": "embed", "texts": ["x"]})
    assert isinstance(embed.asked, EmbedRequest)
    assert Request.parse({"op": "unload", "all": True}).all


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ({"op": "gen", "prompt": "x", "temprature": 0}, "'temprature'; did you mean temperature?"),
        ({"op": "gen", "prompt": "x", "modell": "m"}, "'modell'; did you mean model?"),
        ({"op": "embed", "texts": ["x"], "windw": 9}, "'windw'; did you mean window?"),
        ({"op": "load", "model": "m", "keepalive": 0}, "'keepalive'; did you mean keep_alive?"),
        ({"op": "status", "models": True}, "'models'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_known_one(message: dict[str, Any], hint: str) -> None:
    with pytest.raises(UsageError, match="unknown key") as refused:
        Request.parse(message)
    assert hint in str(refused.value)


def test_a_key_of_megabytes_is_refused_without_looking_for_one_like_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked_for: list[int] = []
    monkeypatch.setattr("difflib.get_close_matches", lambda key, *_: looked_for.append(len(key)) or [])
    with pytest.raises(UsageError, match="unknown key") as refused:
        Request.parse({"op": "gen", "prompt": "x", "temperature" * 1_000_000: 1})
    assert looked_for == []
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("op", [None, "generate", ["gen"], 1])
def test_an_unknown_operation_is_refused(op: Any) -> None:
    with pytest.raises(UsageError, match="no operation"):
        Request.parse({"op": op, "prompt": "x"})


@pytest.mark.parametrize("op", sorted(OPERATIONS))
@pytest.mark.parametrize(
    "field", [{"model": 1}, {"keep_alive": -2}, {"pin": 1}, {"offline": "yes"}, {"options": []}]
)
def test_what_is_wrong_with_the_model_is_named_wherever_it_is_asked_for(
    op: str, field: dict[str, Any]
) -> None:
    asked = {"embed": {"texts": ["x"]}, "gen": {"prompt": "x"}, "count": {"prompt": "x"}}.get(op, {})
    with pytest.raises(UsageError, match=next(iter(field))):
        Request.parse({"op": op, **asked, **field})


# ── messages ────────────────────────────────────────────────────────────────────────────────


def parsed(**message: Any) -> list[dict[str, str]] | None:
    return GenRequest.parse({"messages": [{"role": "user", **message}]}).messages


def test_messages_keep_what_templates_need() -> None:
    assert parsed(content="hi", name="Ada_1") == [{"role": "user", "content": "hi", "name": "Ada_1"}]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parsed(content=parts) == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"content": "", "tool_calls": []}, "tool_calls"),
        ({"content": "x", "tool_call_id": "1"}, "tool_call_id"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "image_url"),
        (
            {
                "content": [
                    {"type": "text", "text": "x", "cache_control": {}},
                ]
            },
            None,
        ),
        ({"content": [{"type": "text"}]}, "text"),
        ({"content": []}, "content"),
        ({"content": ["x"]}, "content"),
        ({"content": "x", "name": "<|im_end|>"}, "name"),
        ({"content": "x", "name": ""}, "name"),
    ],
)
def test_what_a_template_would_not_get_is_refused_by_name(message: dict[str, Any], named: str | None) -> None:
    with pytest.raises(UsageError, match=named or "no more"):
        parsed(**message)
