"""vLLM's own classes say which requests a worker refuses: the orchestrator agrees before it prefills."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.orchestrator.api.refusals import MAX_MODEL_LEN, REFUSED, TAKEN

pytestmark = [pytest.mark.real, pytest.mark.processes]

# In a process of its own: vLLM's imports warn, and are slow.
_SCRIPT = """
import json, sys
from types import SimpleNamespace
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

def refusal(document, max_model_len):
    kind = CompletionRequest if "prompt" in document else ChatCompletionRequest
    try:
        request = kind.model_validate({"model": "m"} | document)
        config = SimpleNamespace(max_model_len=max_model_len, encoder_config=None, is_encoder_decoder=False)
        request.build_tok_params(config)
        most = getattr(request, "max_completion_tokens", None) or request.max_tokens
        room = max_model_len - 10
        request.to_sampling_params(room if most is None else min(most, room), {})
    except Exception as error:
        return str(error)

asked = json.load(sys.stdin)
print("found:", json.dumps([refusal(each, asked["max_model_len"]) for each in asked["documents"]]))
"""


def refusals(documents: list[dict[str, Any]]) -> list[str | None]:
    """What vLLM (0.32) says to requests before they get to its engine."""
    asked = json.dumps({"documents": documents, "max_model_len": MAX_MODEL_LEN})
    done = subprocess.run([sys.executable, "-c", _SCRIPT], input=asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[str | None] = json.loads(done.stdout.partition("found:")[2])
    return found


def test_vllm_refuses_and_takes_what_the_orchestrator_thinks_it_does() -> None:
    found = refusals([*REFUSED, *TAKEN])
    wrong = [
        (document, said)
        for document, said in zip([*REFUSED, *TAKEN], found, strict=True)
        if (said is not None) != (document in REFUSED)
    ]
    assert wrong == []
