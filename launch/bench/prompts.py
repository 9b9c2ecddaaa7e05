"""Request bodies of synthetic text, a pure function of seed and salt.

They are made at the moment of sending and cost next to nothing: all text is cut out of one corpus, so a
prompt of 40,000 tokens is a list of views, not a new string.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from random import Random
from typing import Any

import msgspec

from launch.bench.shapes import Shape, Workload
from orchestrator.transport.base import Part

# Conversations that are under way side by side, where a shape has several turns.
_LANES = 8

_CORPUS_WORDS = 1 << 17  # more than the longest prompt has, whatever the tokenizer

# Plain words, so that tokenizers know most of them, and nothing that JSON would escape.
_WORDS = b"""
the a this that every some of in on to from with without before after under over between about against for
system server worker request answer token cache memory queue stream batch model layer head weight vector
table file record field value number result error limit budget signal event clock minute second hour day
week report review question reason problem change choice policy plan step path node link port host message
customer order price market city street house river mountain garden kitchen window door bridge train ship
reads writes sends takes keeps moves starts stops waits counts checks finds makes gives holds joins splits
opens closes serves shares builds tests measures compares explains returns follows remembers expects needs
fast slow large small early late cold warm full empty shared single double local remote common rare simple
clear quiet steady careful certain possible useful and or but because while then when where again
""".split()


class Corpus:
    """Random words, in one piece of memory."""

    def __init__(self, random: Random) -> None:
        words = random.choices(_WORDS, k=_CORPUS_WORDS)
        self._text = memoryview(b" ".join(words))
        self._starts = [0, *accumulate(len(word) + 1 for word in words)]

    def cut(self, words: int, random: Random) -> memoryview:
        """So many words in a row, from anywhere; no more than there are."""
        words = min(words, _CORPUS_WORDS)
        first = random.randrange(_CORPUS_WORDS - words + 1)
        return self._text[self._starts[first] : self._starts[first + words] - 1]


class Prompts:
    """The bodies of one run: `seed` gives the lengths, `salt` the words.

    Runs with one seed and two salts ask for the same work, but neither finds the other's prefixes in a cache.
    """

    def __init__(
        self,
        corpus: Corpus,
        model: str,
        options: Mapping[str, Any],
        tokens_per_word: float,
        *,
        seed: str,
        salt: str,
    ) -> None:
        """`options` are further fields of each request."""
        self._corpus = corpus
        self._seed = seed
        self._salt = salt
        self._tokens_per_word = tokens_per_word
        fields = {"model": model, "stream": True, "temperature": 0, **options}
        self._opening = msgspec.json.encode(fields)[:-1] + b',"max_tokens":%d,"messages":['

    def body(self, workload: Workload, index: int) -> list[Part]:
        """The request number `index` of a workload, in parts."""
        number, which = divmod(index, len(workload.shapes))
        shape = workload.shapes[which]
        conversation, turn = _place(number, shape.turns)
        name = f"{workload.name}/{which}"
        lengths = Random(f"{self._seed}/{name}/{conversation}")  # noqa: S311  # no secrets
        text = Random(f"{self._salt}/{name}/{conversation}")  # noqa: S311
        parts = self._system(shape, name) if shape.shared else []
        for position in range(shape.messages + 2 * turn):
            role = b"assistant" if position % 2 else b"user"
            parts += self._message(role, shape.message * _vary(shape, lengths), text)
        answer = max(1, round(shape.answer * _vary(shape, lengths)))
        return [self._opening % answer, *parts[:-1], b'"}]}']

    def plain(self, words: int, answer: int) -> list[Part]:
        """One question of exactly so many words."""
        text = self._corpus.cut(words, Random(self._salt))  # noqa: S311
        return [self._opening % answer, b'{"role":"user","content":"', text, b'"}]}']

    def _system(self, shape: Shape, name: str) -> list[Part]:
        """The same in every conversation."""
        return self._message(b"system", shape.shared, Random(f"{self._salt}/{name}/shared"))  # noqa: S311

    def _message(self, role: bytes, tokens: float, text: Random) -> list[Part]:
        """It starts with a number of its own, so that no two beginnings are alike by accident."""
        opening = b'{"role":"%b","content":"%016x ' % (role, text.getrandbits(64))
        words = max(1, round(tokens / self._tokens_per_word))
        return [opening, self._corpus.cut(words, text), b'"},']


def _place(index: int, turns: int) -> tuple[int, int]:
    """Conversation and turn: `_LANES` conversations take turns, then come the next."""
    if turns == 1:
        return index, 0
    group, place = divmod(index, _LANES * turns)
    turn, lane = divmod(place, _LANES)
    return group * _LANES + lane, turn


def _vary(shape: Shape, lengths: Random) -> float:
    return lengths.uniform(1 - shape.spread, 1 + shape.spread)
