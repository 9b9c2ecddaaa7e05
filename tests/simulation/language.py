"""What simulated workers read and say: every answer is known before it is asked for.

A prompt is a list of numbers: the request's own, how long the answer is, then anything. Token `k` of the
answer to request `n` is written `n.k`, so text shows at once what is missing, repeated, or somebody else's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_FIRST_ANSWER_TOKEN = 1_000_000
_PER_REQUEST = 1_000
_TOKEN = re.compile(r"(\d+)\.(\d+)|(\d+)")


def prompt_text(number: int, length: int, padding: int) -> str:
    """A prompt that is answered with `length` tokens."""
    return " ".join(map(str, (number, length, *range(padding))))


def answer_token(number: int, index: int) -> int:
    return _FIRST_ANSWER_TOKEN + number * _PER_REQUEST + index


def is_answer_token(token: int) -> bool:
    return token >= _FIRST_ANSWER_TOKEN


def number_of(tokens: Sequence[int]) -> int:
    """The request that a prompt, or a part of an answer, belongs to."""
    first = tokens[0]
    return (first - _FIRST_ANSWER_TOKEN) // _PER_REQUEST if is_answer_token(first) else first


def text_of(token: int) -> str:
    if not is_answer_token(token):
        return f" {token}"
    number, index = divmod(token - _FIRST_ANSWER_TOKEN, _PER_REQUEST)
    return f" {number}.{index}"


def tokens_of(text: str) -> list[int]:
    """The opposite of joined `text_of`; what is no token is nothing."""
    return [
        answer_token(int(number), int(index)) if index else int(plain)
        for number, index, plain in _TOKEN.findall(text)
    ]


def answer_text(number: int, length: int) -> str:
    return "".join(text_of(answer_token(number, index)) for index in range(length))


def continuation(tokens: Sequence[int]) -> list[int]:
    """What a model that has read `tokens` says until it ends by itself.

    Nonsense, if the part of the answer that is among them is not how that answer begins.
    """
    number, length, *rest = tokens
    said = [token for token in rest if is_answer_token(token)]
    answer = [answer_token(number, index) for index in range(length)]
    is_start = said == answer[: len(said)]
    return answer[len(said) :] if is_start else [answer_token(number, _PER_REQUEST - 1)] * 3
