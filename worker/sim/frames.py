"""Answers have the shapes of vLLM's OpenAI endpoints: whole bodies, and the events of streams."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import orjson

from worker.sim import text
from worker.sim.generate import Opened, Outcome, Piece
from worker.sim.protocol import Job
from worker.sim.runs import Run

VERSION = "0.1.0"
FINGERPRINT = f"sim-{VERSION}"
DONE = b"data: [DONE]\n\n"

Json = dict[str, Any]


def error_body(message: str, kind: str, status: int, param: str | None = None) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}})


def error_events(content: bytes) -> bytes:
    return b"data: " + content + b"\n\n" + DONE


def event(document: Json) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


class Answer:
    """This is one request's answer; the endpoints differ in most of it.

    `kv_error` is the body that says that a hand-off was lost.
    """

    kv_error = error_body("Internal server error", "InternalServerError", 500)
    cuts_stream = False  # a stream whose hand-off was lost has no end, as of a server that failed

    def __init__(self, job: Job) -> None:
        self.job = job
        self._created = int(time.time())
        self._completion_tokens = 0
        self._prompt_tokens = 0
        self._runs: list[Run] = []

    def whole(self, outcome: Outcome) -> Json:
        raise NotImplementedError

    def opened(self, opened: Opened) -> list[Json]:
        """Return the events before a prompt's first token."""
        raise NotImplementedError

    def piece(self, piece: Piece) -> Json:
        raise NotImplementedError

    def usage_event(self) -> Json:
        """Return what a stream ends with if it was asked for usage."""
        usage = self._plain_usage(self._completion_tokens)
        usage["prompt_tokens_details"] = self._stream_details()
        return {**self._head(), "choices": [], "usage": usage, "system_fingerprint": FINGERPRINT}

    # --- the bytes of a stream

    def opening(self, opened: Opened) -> list[bytes]:
        """Return the events before a prompt's first token, as they are written one by one."""
        return list(map(event, self.opened(opened)))

    def said(self, piece: Piece) -> bytes:
        return event(self.piece(piece))

    def ending(self) -> list[bytes]:
        """Return what a whole stream ends with."""
        return [*([event(self.usage_event())] if self.job.include_usage else []), DONE]

    def aborted(self) -> list[bytes]:
        """Return what a stream ends with that was ended on request."""
        return [DONE]

    def lost(self) -> list[bytes]:
        """Return what a stream says, and ends with, whose hand-off was lost."""
        return [b"data: " + self.kv_error + b"\n\n", DONE]

    def error_events(self, content: bytes) -> bytes | None:
        """Return what a stream ends with that fails with this error body; None if its connection is cut."""
        return error_events(content)

    # --- what answers are made of

    def _head(self) -> Json:
        raise NotImplementedError

    def _stream_details(self) -> Json:
        raise NotImplementedError

    def _chunk_usage(self) -> Json:
        return self._plain_usage(self._completion_tokens)

    def _open(self, run: Run) -> None:
        self._runs.append(run)
        self._prompt_tokens += len(run.prompt.tokens)

    def _chunk(self, choice: Json, piece: Piece | None = None) -> Json:
        """Make an event. The last of a choice carries the fingerprint, unless the usage event will."""
        chunk = {**self._head(), "choices": [choice]}
        if piece is not None and piece.finish and not self.job.include_usage:
            chunk["system_fingerprint"] = FINGERPRINT
        if self.job.continuous_usage:
            chunk["usage"] = self._chunk_usage()
        return chunk

    def _plain_usage(self, completion_tokens: int) -> Json:
        return {
            "prompt_tokens": self._prompt_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
        }

    def _whole_usage(self, outcome: Outcome, created_tokens: int | None) -> Json:
        self._prompt_tokens = sum(len(run.prompt.tokens) for run in outcome.runs)
        details = {
            "cached_tokens": outcome.runs[-1].cached_tokens,
            "created_cache_tokens": created_tokens,
            "multimodal_tokens": None,
        }
        return {
            **self._plain_usage(sum(map(len, outcome.pieces.values()))),
            "prompt_tokens_details": None if self.job.sampling.is_beam else details,
            "completion_tokens_details": None,
        }


class ChatAnswer(Answer):
    def whole(self, outcome: Outcome) -> Json:
        (run,) = outcome.runs
        return {
            **self._head("chat.completion"),
            "choices": [self._choice(pieces) for pieces in outcome.pieces.values()],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": self._whole_usage(outcome, run.created_tokens),
            "prompt_logprobs": prompt_logprobs(self.job, run),
            "prompt_token_ids": list(run.prompt.tokens) if self.job.return_token_ids else None,
            "prompt_text": None,
            "kv_transfer_params": run.kv,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def opened(self, opened: Opened) -> list[Json]:
        self._open(opened.run)
        tokens = list(opened.run.prompt.tokens) if self.job.return_token_ids else None
        return self.role_chunks(tokens) + self._echo_chunks()

    def role_chunks(self, prompt_token_ids: list[int] | None = None) -> list[Json]:
        chunks = []
        for index in range(self.job.choices):
            choice = {"index": index, "delta": {"role": "assistant", "content": ""}}
            chunk = self._chunk({**choice, "logprobs": None, "finish_reason": None})
            chunks.append({**chunk, "prompt_token_ids": prompt_token_ids, "prompt_text": None})
        return chunks

    def lost(self) -> list[bytes]:
        """Begin with the role chunks even then, as vLLM does."""
        return [*map(event, self.role_chunks()), *super().lost()]

    def piece(self, piece: Piece) -> Json:
        self._completion_tokens += 1
        choice: Json = {
            "index": piece.index,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs([piece]),
            "finish_reason": piece.finish,
        }
        if piece.finish:
            choice["stop_reason"] = piece.stop
        choice["token_ids"] = [piece.token] if self.job.return_token_ids else None
        return self._chunk(choice, piece)

    def _echo_chunks(self) -> list[Json]:
        said = self.job.prompt_texts[0]
        if not (self.job.echo and said):
            return []
        choices = ({"index": index, "delta": {"content": said}} for index in range(self.job.choices))
        return [self._chunk({**choice, "logprobs": None, "finish_reason": None}) for choice in choices]

    def _choice(self, pieces: Sequence[Piece]) -> Json:
        echoed = self.job.prompt_texts[0] if self.job.echo else ""
        message = {
            "role": "assistant",
            "content": echoed + "".join(piece.text for piece in pieces),
            "refusal": None,
            "annotations": None,
            "audio": None,
            "function_call": None,
            "reasoning": None,
        }
        return {
            "index": pieces[0].index,
            "message": message,
            "logprobs": self._logprobs(pieces),
            "finish_reason": pieces[-1].finish,
            "stop_reason": pieces[-1].stop,
            "token_ids": [piece.token for piece in pieces] if self.job.return_token_ids else None,
            "routed_experts": None,
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        if self.job.logprobs is None:
            return None
        return {"content": [_chat_logprob(piece.token, self.job.logprobs) for piece in pieces]}

    def _head(self, kind: str = "chat.completion.chunk") -> Json:
        job = self.job
        return {"id": job.request_id, "object": kind, "created": self._created, "model": job.model}

    def _chunk_usage(self) -> Json:
        return {**super()._chunk_usage(), "completion_tokens_details": None}

    def _stream_details(self) -> Json:
        run = self._runs[0]
        return {"cached_tokens": run.cached_tokens, "created_cache_tokens": run.created_tokens}


class CompletionAnswer(Answer):
    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._begun: set[int] = set()
        self._offsets: dict[int, int] = {}

    def whole(self, outcome: Outcome) -> Json:
        return {
            **self._head(),
            "choices": [self._choice(pieces, outcome) for pieces in outcome.pieces.values()],
            "service_tier": None,
            "system_fingerprint": FINGERPRINT,
            "usage": self._whole_usage(outcome, None),
            "kv_transfer_params": outcome.runs[0].kv,
            "ec_transfer_params": None,
            "metrics": None,
        }

    def opened(self, opened: Opened) -> list[Json]:
        self._open(opened.run)
        return []

    def piece(self, piece: Piece) -> Json:
        """Make the event of a piece; the first of a choice also carries what is echoed."""
        self._completion_tokens += 1
        run = self._runs[-1]
        is_first = piece.index not in self._begun
        self._begun.add(piece.index)
        is_shown = is_first and (self.job.return_token_ids or self.job.echo)
        choice = {
            "index": piece.index,
            "text": (self._echoed(piece.index) if is_first else "") + self._said([piece]),
            "logprobs": self._logprobs([piece], run, with_prompt=is_first),
            "finish_reason": piece.finish,
            "stop_reason": piece.stop,
            "prompt_token_ids": list(run.prompt.tokens) if is_shown else None,
            "token_ids": [piece.token] if self.job.return_token_ids else None,
        }
        return self._chunk(choice, piece)

    def _choice(self, pieces: Sequence[Piece], outcome: Outcome) -> Json:
        index = pieces[0].index
        run = outcome.runs[index // self.job.choices]
        return {
            "index": index,
            "text": self._echoed(index) + self._said(pieces),
            "logprobs": self._logprobs(pieces, run, with_prompt=True),
            "finish_reason": pieces[-1].finish,
            "stop_reason": pieces[-1].stop,
            "token_ids": [piece.token for piece in pieces] if self.job.return_token_ids else None,
            "prompt_logprobs": prompt_logprobs(self.job, run),
            "prompt_token_ids": list(run.prompt.tokens) if self.job.return_token_ids else None,
            "routed_experts": None,
        }

    def _echoed(self, index: int) -> str:
        is_echoed = self.job.echo and not self.job.return_token_ids
        return self.job.prompt_texts[index // self.job.choices] if is_echoed else ""

    def _said(self, pieces: Sequence[Piece]) -> str:
        return "".join(piece.text for piece in pieces) if self.job.generates else ""

    def _logprobs(self, pieces: Sequence[Piece], run: Run, *, with_prompt: bool) -> Json | None:
        if self.job.logprobs is None:
            return None
        prompt = list(run.prompt.tokens) if self.job.echo and with_prompt else []
        tokens = prompt + [piece.token for piece in pieces if self.job.generates]
        strings = [text.decode([token]) for token in tokens]
        known = [token if number or not prompt else None for number, token in enumerate(tokens)]
        return {
            "text_offset": self._text_offsets(pieces[0].index, strings),
            "token_logprobs": [None if token is None else _logprob(token) for token in known],
            "tokens": strings,
            "top_logprobs": [None if token is None else self._top(token) for token in known],
        }

    def _text_offsets(self, index: int, strings: Sequence[str]) -> list[int]:
        offsets = []
        for string in strings:
            offsets.append(self._offsets.get(index, 0))
            self._offsets[index] = offsets[-1] + len(string)
        return offsets

    def _top(self, token: int) -> dict[str, float]:
        return {text.decode([other]): logprob for other, logprob in _top(token, self.job.logprobs or 1)}

    def _head(self) -> Json:
        job = self.job
        return {
            "id": job.request_id,
            "object": "text_completion",
            "created": self._created,
            "model": job.model,
        }

    def _stream_details(self) -> Json:
        return {"cached_tokens": self._runs[0].cached_tokens}


def prompt_logprobs(job: Job, run: Run) -> list[Json | None] | None:
    """Return the log probabilities per prompt token; the first has none."""
    wanted = job.prompt_logprobs
    if wanted is None and job.echo:
        wanted = job.logprobs
    if wanted is None:
        return None
    return [None, *(_prompt_logprob(token, wanted) for token in run.prompt.tokens[1:])]


def _prompt_logprob(token: int, wanted: int) -> Json:
    return {
        str(other): {"logprob": logprob, "rank": rank, "decoded_token": text.decode([other])}
        for rank, (other, logprob) in enumerate(_top(token, max(1, wanted)), start=1)
    }


def _chat_logprob(token: int, wanted: int) -> Json:
    top = [_one_logprob(other, logprob) for other, logprob in _top(token, wanted)]
    return {**_one_logprob(token, _logprob(token)), "top_logprobs": top}


def _one_logprob(token: int, logprob: float) -> Json:
    said = text.decode([token])
    return {"token": said, "logprob": logprob, "bytes": list(said.encode())}


def _logprob(token: int) -> float:
    return -0.125 - token % 64 / 64


def _top(token: int, wanted: int) -> list[tuple[int, float]]:
    """Return the token itself and then the words that follow it in the vocabulary."""
    return [(token + step, _logprob(token) - step) for step in range(wanted)]


def answer_for(job: Job) -> Answer:
    """Return the answer of a chat or a completion; the other endpoints have files of their own."""
    return ChatAnswer(job) if job.is_chat else CompletionAnswer(job)
