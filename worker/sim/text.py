"""The simulated model has a tokenizer, the digest that stands for a KV cache, and something to say.

What is said is a pure function of a digest and the sampling parameters. Whoever holds the wrong digest says
the wrong words, as an engine does that reads somebody else's KV cache. A prompt that ends in a part of its
own answer is continued, as by any model.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator, Sequence
from itertools import count, islice

from worker.sim.words import WORDS

IM_START, EOS, EOS_NOW = 0, 1, 2
SPECIAL_TOKENS = {"<|im_start|>": IM_START, "<|im_end|>": EOS, "<|eos_now|>": EOS_NOW}
"""`<|eos_now|>` in a prompt is a marker for tests: the answer's first token is the end of the answer."""

_FIRST_WORD = 16
_SPECIAL_TEXT = {token: text for text, token in SPECIAL_TOKENS.items()}
_SPECIAL_SPLIT = re.compile("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")")

# A text token is one to three bytes of UTF-8, little end first, and their number in the top byte.
VOCAB_SIZE = 4 << 24

# An answer ends by itself after 8 to 47 tokens.
_SHORTEST, _SPREAD = 8, 40
_WORDS_PER_BLOCK = 64  # bytes of one BLAKE2b hash
_WORD_TOKENS = {word: _FIRST_WORD + index for index, word in enumerate(WORDS)}

_DIGEST_BYTES = 32  # behind them, if words of the answer were there already: how many
_COUNT_BYTES = 4


def encode(text: str) -> list[int]:
    """Return the token ids of a text; `decode` gives it back. The names of special tokens become those
    tokens, and a text that is nothing but words of an answer becomes the tokens that the answer had.
    """
    return _encode_words(text) or _encode_text(text)


def _encode_words(text: str) -> list[int]:
    """Return the ids of words; none if there is anything else in the text."""
    before, *words = text.split(" ") if text.startswith(" ") else (text,)
    is_answer = not before and all(word in _WORD_TOKENS for word in words)
    return [_WORD_TOKENS[word] for word in words] if is_answer else []


def _encode_text(text: str) -> list[int]:
    tokens: list[int] = []
    for part in _SPECIAL_SPLIT.split(text):
        if part in SPECIAL_TOKENS:
            tokens.append(SPECIAL_TOKENS[part])
        elif part:
            tokens += _encode_bytes(part.encode("utf-8", "surrogatepass"))
    return tokens


def decode(tokens: Sequence[int]) -> str:
    """Return the text of token ids; bytes that are not UTF-8 become U+FFFD, ids without a meaning nothing."""
    return b"".join(map(_token_bytes, tokens)).decode("utf-8", "replace")


def render_chat(messages: Sequence[tuple[str, str]], *, add_generation_prompt: bool = True) -> str:
    """Apply the chat template: `messages` are (role, content)."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)
    return text + "<|im_start|>assistant\n" if add_generation_prompt else text


def garbled(digest: bytes, by: str = "") -> bytes:
    """Return a digest that is answered as long as `digest` is, but with other words."""
    other = hashlib.sha256(by.encode() + digest[1:_DIGEST_BYTES]).digest()
    return digest[:1] + other[1:] + digest[_DIGEST_BYTES:]


def digest_of(tokens: Sequence[int]) -> bytes:
    """Return bytes that stand for the KV cache of a prompt. The first one says how long the answer is."""
    said = _words_said(tokens)
    prompt = tokens[: len(tokens) - said]
    digest = hashlib.sha256(struct.pack(f"<{len(prompt)}I", *prompt)).digest()
    ending = 0 if EOS_NOW in prompt else max(1, digest[0])
    return bytes([ending]) + digest[1:] + (said.to_bytes(_COUNT_BYTES, "little") if said else b"")


def _words_said(tokens: Sequence[int]) -> int:
    """Count the words of an answer that these tokens end in: those after the prompt's text."""
    start = len(tokens)
    while start and _FIRST_WORD <= tokens[start - 1] < _FIRST_WORD + len(WORDS):
        start -= 1
    is_after_text = start > 0 and tokens[start - 1] >> 24 > 0
    return len(tokens) - start if is_after_text else 0


def _position(digest: bytes) -> int:
    return int.from_bytes(digest[_DIGEST_BYTES:], "little")


def answer_length(digest: bytes) -> int:
    """Count the tokens before the answer ends by itself, without those that are there already."""
    return 0 if digest[0] == 0 else max(0, _SHORTEST + digest[0] % _SPREAD - _position(digest))


def speak(digest: bytes, variant: bytes = b"") -> Iterator[int]:
    """Yield word tokens without end. `variant` tells apart samples of one prompt; greedy is the empty one."""
    return islice(_words(digest[:_DIGEST_BYTES], variant), _position(digest), None)


def _words(digest: bytes, variant: bytes) -> Iterator[int]:
    for block in count():
        key = digest + block.to_bytes(4, "little") + variant
        for byte in hashlib.blake2b(key, digest_size=_WORDS_PER_BLOCK).digest():
            yield _FIRST_WORD + byte


def _encode_bytes(data: bytes) -> Sequence[int]:
    """Encode by four strided copies, as a prompt may be megabytes."""
    whole, rest = divmod(len(data), 3)
    packed = bytearray(4 * whole)
    for place in range(3):
        packed[place::4] = data[place : 3 * whole : 3]
    packed[3::4] = b"\x03" * whole
    if rest:
        packed += data[-rest:].ljust(3, b"\0") + bytes([rest])
    return struct.unpack(f"<{len(packed) // 4}I", packed)


def _token_bytes(token: int) -> bytes:
    length = token >> 24
    if length:
        return token.to_bytes(4, "little")[:length]
    if token >= _FIRST_WORD:
        word = WORDS[token - _FIRST_WORD] if token < _FIRST_WORD + len(WORDS) else ""
        return f" {word}".encode() if word else b""
    return _SPECIAL_TEXT.get(token, "").encode()
