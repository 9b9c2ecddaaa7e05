from __future__ import annotations

import base64
import json
from array import array

import pytest

from orchestrator.legs.connectors.base import Handoff, TokenIds
from orchestrator.relay.outcomes import Prefilled
from orchestrator.routing.policies.base import End

IDS = [1, 2, 70000]
PACKED = array("i", IDS).tobytes()
FORMS = {
    "list": TokenIds(json=json.dumps(IDS).encode()),
    "base64": TokenIds(json=json.dumps(base64.b64encode(PACKED).decode()).encode()),
    "bin": TokenIds(packed=PACKED),
}


@pytest.mark.parametrize("form", FORMS)
def test_policies_get_the_ids_of_a_prefill_whatever_their_form(form: str) -> None:
    outcome = Prefilled(1.0, Handoff(b"{}", 16, FORMS[form]))
    assert list(outcome.prompt_ids() or ()) == IDS
    assert (outcome.end, outcome.moment, outcome.cached_tokens) == (End.ANSWERED, 1.0, 16)


def test_there_are_no_ids_if_the_worker_gave_none() -> None:
    outcome = Prefilled(1.0, Handoff(b"{}", None))
    assert outcome.prompt_ids() is None
    assert outcome.cached_tokens is None
