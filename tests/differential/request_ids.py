"""Cases of what clients call their requests: vLLM makes the `id` of the answer of it."""

from __future__ import annotations

from dataclasses import replace

from tests.differential.case import Case, both, completion
from tests.differential.other_paths import embedding, message, response

# A head may say all of this. What is no ASCII is read as Latin-1.
_IDS = {
    "a word": "mine-1",
    "one of a leg": "req-0123456789abcdef-2",
    "nothing": "",
    "blanks": "a b\tc",
    "quotes": "\"a\",'b', \\u0000 \\",
    "signs": "../{0}%s:;,<script>|*?#",
    "no ASCII": "h\u00e9\u00ff",
    "200 characters": "x" * 200,
    "20,000 characters": "x" * 20_000,
}


def _named(case: Case, what: str, given: str) -> Case:
    headers = {**case.headers, "x-request-id": given}
    return replace(case, name=f"{case.name} whose head names it: {what}", headers=headers)


REQUEST_IDS: list[Case] = [
    *(_named(case, what, given) for what, given in _IDS.items() for case in both("one")),
    *(_named(case, what, given) for what, given in _IDS.items() for case in both("a stream", stream=True)),
    _named(message("one"), "a word", "mine-1"),
    _named(message("a stream", stream=True), "a word", "mine-1"),
    *(_named(case, "a word", "mine-1") for case in both("two choices", n=2, temperature=0.5)),
    _named(completion("several prompts", ["a", "b"], is_whole=True), "a word", "mine-1"),
    _named(response("one"), "a word", "mine-1"),
    _named(embedding("one"), "a word", "mine-1"),
    _named(embedding("one", encoding_format="base64"), "a word, base64", "mine-1"),
    *both("request_id", request_id="abc"),
    *both("request_id, streamed", request_id="abc", stream=True),
    *both("request_id empty", request_id=""),
    *both("request_id of any signs", request_id='a "b"\n\u00e9\u4e16 \u0000'),
    *(_named(case, "a word", "mine-1") for case in both("request_id, too", request_id="abc")),
    embedding("request_id", request_id="abc"),
    message("request_id", request_id="abc"),
]
