"""A worker of ours says how busy it is, by the legs of all orchestrators, and whether it wants new ones.

    GET /baton/ready      ->  200, `LoadReport` with `state: serving`; 503, the same with `state: draining`
    POST /baton/drain     ->  202, the report: the worker wants no new legs; those under way go on
    POST /baton/undrain   ->  202, the report: it wants new ones again

Both POSTs need the worker's key. An orchestrator names itself in `SENDER_HEADER`, in its legs and questions:
all its processes by one name. So the worker can tell it exactly what others have there, and it need not
guess which of the legs that are counted there are its own. Whole answers to legs that name their sender have
`LOAD_HEADER`, with the same figures: `OTHERS,RUNNING,WAITING,PROMPT_TOKENS,KV,SEATS,SENDERS`, whole numbers
(KV in thousandths) or nothing where one is not known. Later versions may say more after these.

A worker without our plugin answers 404 to all of them, and its answers do not have the header.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from orchestrator.wire.info import Count, Label

READY_PATH: Final = "/baton/ready"
DRAIN_PATH: Final = "/baton/drain"
UNDRAIN_PATH: Final = "/baton/undrain"
SENDER_HEADER: Final = "X-Baton-From"
LOAD_HEADER: Final = "X-Baton-Load"
MAX_SENDER: Final = 64  # characters


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """A worker reports this of one moment. Of a server with several engines it is about the one that the
    question names (`x-data-parallel-rank`), else about all.
    """

    state: Literal["serving", "draining"]
    revision: Label | None = None  # of the model's files, as it announces it
    running: Count  # sequences that the engine computes
    waiting: Count  # those that wait in it, and legs that it does not have yet, or any more
    prompt_tokens: Count  # of the prompts of both
    kv: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0  # the share of its KV cache that is in use
    seats: Count | None = None  # sequences that it computes at a time
    others: Count | None = None  # legs under way that others than the asking orchestrator have sent
    senders: Count | None = None  # orchestrators that were heard of late, the asking one among them
    # While it drains: orchestrators heard of late that have not asked since, and may still send legs.
    unaware: Count = 0

    @property
    def is_draining(self) -> bool:
        return self.state == "draining"

    @property
    def busy(self) -> int:
        """So many sequences are there."""
        return self.running + self.waiting


_decoder: Final = msgspec.json.Decoder(LoadReport)


def read_report(status: int, content: bytes) -> LoadReport | None:
    """Return what the answer to a question for `READY_PATH` reports; None if it is no report."""
    if status not in (200, 503):
        return None
    try:
        report = _decoder.decode(content)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return report if report.is_draining == (status == 503) else None


def load_header(report: LoadReport) -> bytes:
    """Return the value of `LOAD_HEADER`."""
    others, seats, senders = (
        "" if each is None else each for each in (report.others, report.seats, report.senders)
    )
    kv = round(report.kv * 1000)
    text = f"{others},{report.running},{report.waiting},{report.prompt_tokens},{kv},{seats},{senders}"
    return text.encode()


# --- vLLM's own figures, of a worker that is not ours -------------------------------------------

_RUNNING: Final = b"vllm:num_requests_running{"
_WAITING: Final = b"vllm:num_requests_waiting{"
_KV: Final = b"vllm:kv_cache_usage_perc{"
MOST_ENGINES: Final = 64  # of one server that are looked at


def read_metrics(page: bytes, rank: int | None = None) -> LoadReport | None:
    """Return what a metrics page of vLLM reports, of the engine of this rank or of all; None if it has no
    such figures.
    """
    running, waiting = _values(page, _RUNNING, rank), _values(page, _WAITING, rank)
    if not running or not waiting:
        return None
    kv = _values(page, _KV, rank)
    return LoadReport(
        state="serving",
        running=int(sum(running)),
        waiting=int(sum(waiting)),
        prompt_tokens=0,
        kv=min(max(kv, default=0.0), 1.0),
    )


def _values(page: bytes, name: bytes, rank: int | None) -> list[float]:
    """Return the values of a metric, found without reading the page line by line."""
    found: list[float] = []
    at = 0 if page.startswith(name) else page.find(b"\n" + name)
    for _ in range(MOST_ENGINES):
        if at < 0:
            break
        end = page.find(b"\n", at + 1)
        line = page[at:] if end < 0 else page[at:end]
        labels, _, value = line.rpartition(b"} ")
        if rank is None or b'engine="%d"' % rank in labels:
            found += _number(value)
        at = -1 if end < 0 else page.find(b"\n" + name, end)
    return found


def _number(text: bytes) -> list[float]:
    try:
        value = float(text)
    except ValueError:
        return []
    return [value] if 0.0 <= value <= 2.0**53 else []
