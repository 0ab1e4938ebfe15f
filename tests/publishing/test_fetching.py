"""A model that the Hub does not give: one short sentence that says which of the reasons it is."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import close_session

from apex4_quant.errors import UsageError
from apex4_quant.models.source import resolve_model

from ..hub_server.server import HubServer


def sentence(model: str) -> str:
    with pytest.raises(UsageError) as refused:
        resolve_model(model)
    said = str(refused.value)
    assert len(said) < 230 and "\n" not in said and "http" not in said.replace("HTTP status", "")
    return said


def test_what_the_hub_answers(at_hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert "not there or private, check the id and the access token" in sentence("org/absent")
    assert "no legal id, give ORG/NAME" in sentence("org/name..with--both")
    at_hub.inject("GET .*org/absent", status=503, times=1000)
    assert "it answered with HTTP status 503, try again later" in sentence("org/absent")


def test_nobody_answers(at_hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("hf_api.api.endpoint", "constants.ENDPOINT"):
        monkeypatch.setattr(f"huggingface_hub.{name}", "http://127.0.0.1:9")
    close_session()
    assert "cannot be reached and the model is not in the cache, check the network" in sentence("org/name")


def test_offline(at_hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "offline mode is on (HF_HUB_OFFLINE)" in sentence("org/name")
