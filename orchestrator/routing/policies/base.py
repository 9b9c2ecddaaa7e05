"""A routing policy chooses the worker of one leg, and hears how that leg ended.

A policy is one file beside this one and one entry in the table (`policies/__init__.py`). The file ends with
its `PolicySpec`: the name that the config gives it, its arguments, and a sentence for the docs. Which names
and arguments a config may have, the JSON Schema and the docs follow from that; all files here are compiled.

Policies are pure: they import nothing of the orchestrator and do no I/O; time and chance come from their
`Context`. So the same code runs in a simulation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from random import Random
from typing import Any, Final, Generic, Protocol, TypeVar

from orchestrator.compiled import mypyc_attr
from orchestrator.routing.policies.prediction import Prediction

# --- what a policy sees -------------------------------------------------------------------------


@mypyc_attr(allow_interpreted_subclasses=True)
class Ranking(ABC):
    """A ranking keeps the candidates of a large pool in the order of their loads."""

    __slots__ = ()

    @abstractmethod
    def least(self, candidates: Sequence[Any], first: int) -> Any:
        """Return the candidate with the fewest legs under way: of equals the first one from the index `first`
        on, or else of all. None if these candidates are not the ones that are kept in order.
        """
        ...

    @abstractmethod
    def legs(self, candidates: Sequence[Any]) -> int:
        """Return how many legs are under way on all of these candidates; -1 if they are not kept in order."""
        ...


class Candidate(Protocol):
    """A candidate is a worker as a policy sees it. Policies read, they change nothing."""

    @property
    def name(self) -> str:
        """The name stays the same for as long as the worker is known."""
        ...

    @property
    def in_flight(self) -> int:
        """The worker serves so many legs now, those of other processes included."""
        ...

    @property
    def epoch(self) -> int:
        """The epoch grows each time the worker comes back into service: its caches may be empty then."""
        ...

    @property
    def kv_tokens(self) -> int | None:
        """So many tokens fit into the worker's KV cache; None if it does not say."""
        ...


C = TypeVar("C", bound=Candidate)
RANKED: Final = 32  # pools of more workers can be kept in order: fewer are looked at as fast


def ranking_of(candidate: Candidate) -> Ranking | None:
    """Return the ranking that a candidate is in; None if its pool is small, or nobody keeps it in order."""
    found: Ranking | None = getattr(candidate, "ranking", None)
    return found


@mypyc_attr(allow_interpreted_subclasses=True)
class Request(ABC):
    """A policy may ask this of a request. Nothing is read, copied or decoded before it is asked for, and
    nothing is kept: a policy that needs an answer twice keeps it. Values are the client's own bytes.
    """

    model: str  # the model, or the adapter, that the client named

    @abstractmethod
    def body_bytes(self) -> int:
        """Return the size of the client's document, without white space between its fields."""
        ...

    @abstractmethod
    def prompt_tokens(self) -> int:
        """Estimate how many tokens the prompt has; nobody has tokenised it yet."""
        ...

    @abstractmethod
    def prompt(self, most: int) -> bytes:
        """Return the first `most` bytes of what the model reads, in a fixed order whatever the client's order
        was.

        It is JSON as the client wrote it: requests with equal beginnings have equal prompts up to there.
        """
        ...

    @abstractmethod
    def prompt_ids(self) -> Sequence[int] | None:
        """Return the prompt's token ids if the client sent ids; None if it sent text."""
        ...

    @abstractmethod
    def field(self, name: str) -> memoryview | None:
        """Return the JSON value of a field of the client's document, not copied; None if it is not there."""
        ...

    @abstractmethod
    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header of the client; `name` is in lower case. None if it is not there."""
        ...


class Context:
    """A policy is made with this, beside its arguments."""

    __slots__ = ("model", "random", "role", "share", "time")

    def __init__(
        self,
        model: str,
        role: str,
        random: Random,
        time: Callable[[], float],
        share: Callable[[bytes], None] | None = None,
    ) -> None:
        """`role` is that of the candidates. `random` is the only source of chance, `time` the only clock: in
        seconds, it never goes back. `share` is given where other processes choose among the same workers:
        what it is called with the same policy `hear`s in each of them, within about a second; some may be
        lost.
        """
        self.model = model
        self.role = role
        self.random = random
        self.time = time
        self.share = share


# --- what a worker's cache tells ----------------------------------------------------------------


class CacheEvent:
    """An engine tells what has become of its KV cache. Blocks are named by its own hashes."""

    __slots__ = ()


class Stored(CacheEvent):
    """Blocks that follow each other are in the cache now."""

    __slots__ = ("block_size", "hashes", "ids", "parent", "salts")

    def __init__(
        self,
        hashes: list[Any],
        parent: int | bytes | None,
        ids: bytes,
        block_size: int,
        salts: list[str] | None = None,
    ) -> None:
        """`parent` is the block before the first, None if that is a prompt's beginning. `ids` are the tokens
        of all blocks, `block_size` to each, as int32. `salts` has for each block what tells it from others
        with the same tokens, such as the adapter's name; None if nothing does.
        """
        self.hashes = hashes
        self.parent = parent
        self.ids = ids
        self.block_size = block_size
        self.salts = salts


class Removed(CacheEvent):
    """Blocks are not in the cache any more."""

    __slots__ = ("hashes",)

    def __init__(self, hashes: list[Any]) -> None:
        self.hashes = hashes


class Cleared(CacheEvent):
    """The cache is empty."""

    __slots__ = ()


class Followed(CacheEvent):
    """All that becomes of the cache is told from now on, or some of it was or will be missing."""

    __slots__ = ("is_exact",)

    def __init__(self, *, is_exact: bool) -> None:
        self.is_exact = is_exact


# --- what a policy says and hears ---------------------------------------------------------------


class End(IntEnum):
    """A leg that a policy has chosen the worker of ended in one of these ways."""

    ANSWERED = 0  # the worker did what it was asked for
    REFUSED = 1  # the worker answered that it would not do it: it was too busy, or the client was mistaken
    FAILED = 2  # the worker is to blame
    CANCELLED = 3  # the leg was not sent, or not waited for


@mypyc_attr(allow_interpreted_subclasses=True)
class Outcome:
    """An outcome is the end of a leg, and what it has taught. A number that nobody knows is None."""

    __slots__ = ("_prompt_tokens", "cached_tokens", "end", "moment")

    def __init__(
        self,
        end: End,
        moment: float,
        cached_tokens: int | None = None,
        prompt_tokens: int | None = None,
    ) -> None:
        """`moment` is of `Context.time`. `cached_tokens` are those of the `prompt_tokens` that a prefill
        worker found in its cache.
        """
        self.end = end
        self.moment = moment
        self.cached_tokens = cached_tokens
        self._prompt_tokens = prompt_tokens

    def prompt_tokens(self) -> int | None:
        """Return how many tokens a prefill worker counted in the prompt, if it told."""
        return self._prompt_tokens

    def prompt_ids(self) -> Sequence[int] | None:
        """Return the prompt's token ids as a prefill worker made them, if it told; they are decoded anew by
        each call.
        """
        return None


@mypyc_attr(allow_interpreted_subclasses=True)
class Choice(Generic[C]):
    """A choice is the worker of one leg. `str` of it is the reason, a sentence for logs without text of the
    prompt.

    A policy whose reasons have numbers in them extends it, keeps the numbers, and words them in `__str__`:
    most reasons are never read. It may keep there, too, what it wants to know again when the leg has ended.
    """

    __slots__ = ("_reason", "policy", "worker")

    def __init__(self, worker: C, reason: str, policy: Policy | None = None) -> None:
        """`policy` is given by a policy that wants to hear of the end of the leg; None once it has."""
        self.worker = worker
        self._reason = reason
        self.policy = policy

    def __str__(self) -> str:
        return self._reason

    def own_s(self) -> float:
        """Return how many seconds the leg itself is expected to take; -1.0 if the policy does not reckon
        that.
        """
        return -1.0

    def ended(self, outcome: Outcome) -> None:
        """Tell the policy that chose how the leg ended, whatever became of it; only the first call counts."""
        policy, self.policy = self.policy, None
        if policy is not None:
            policy.ended(self, outcome)

    def prompt_tokens(self) -> float:
        """Return how many tokens the prompt was reckoned with; -1 if that was not asked."""
        return -1.0

    def terms(self) -> dict[str, float]:
        """Return the numbers that spoke for the worker when it was chosen, by name; seconds end with `_s`."""
        return {}


class Reasoned(Choice[Any]):
    """It is chosen for a reason that is not its policy's own."""

    __slots__ = ("_why",)

    def __init__(self, worker: Any, why: object, policy: Policy | None = None) -> None:
        super().__init__(worker, "", policy)
        self._why = why

    def __str__(self) -> str:
        return str(self._why)


class Reasons(Generic[C]):
    """These are the reasons for which a request is served as it is. `str` of a choice is a sentence, which is
    made when it is read.
    """

    __slots__ = ("decode_choice", "decodes", "prefill_choice", "prefills", "whole_reason")

    def __init__(
        self, prefill_choice: Choice[C] | None, decode_choice: Choice[C], whole_reason: str | None = None
    ) -> None:
        """`whole_reason` is why one worker does everything; None if there are two. The choices tell why it is
        these workers.
        """
        self.prefill_choice = prefill_choice
        self.decode_choice = decode_choice
        self.whole_reason = whole_reason
        # Who could be chosen; None where only one worker could be, or none is needed.
        self.prefills: Sequence[C] | None = None
        self.decodes: Sequence[C] | None = None


@mypyc_attr(allow_interpreted_subclasses=True)
class Appraisal(ABC):
    """An appraisal says what a request would cost at workers, in seconds, and can have one of them chosen.

    It is made without any change to the policy, and is good until the policy chooses, or hears, the next
    time.
    """

    def __init__(self, tokens: float = 0.0) -> None:
        """`tokens` are those of the prompt, if they were asked for."""
        self.tokens = tokens
        self.indexes: list[int] = []  # of the candidates that were looked at, in turn: of equals the first
        self.costs: list[float] = []  # of each of these

    @abstractmethod
    def take(self, index: int, why: object | None = None) -> Choice[Any]:
        """Choose the candidate with this index, which need not be the cheapest. If `why` is given, `str` of
        it is the reason, for others have decided.
        """
        ...


class Explanation:
    """An explanation says what a policy would choose, and the numbers of all that it could choose."""

    __slots__ = ("index", "reason", "terms")

    def __init__(self, index: int, reason: str, terms: list[dict[str, float]]) -> None:
        """`terms` are those of each candidate (`Choice.terms`)."""
        self.index = index
        self.reason = reason
        self.terms = terms


@mypyc_attr(allow_interpreted_subclasses=True)
class Policy(ABC):
    """A policy chooses one of the workers of a role that may take a request. There is one instance per model
    and role.

    It is made anew only when its own options change, so what it has learned stays.
    """

    @abstractmethod
    def choose(self, request: Request, candidates: Sequence[C]) -> Choice[C]:
        """Choose one of `candidates`, which is not empty and in the order of the config. It is synchronous
        and never fails.

        Takes a few hundred microseconds at most, also of a large prompt: the event loop waits for it.
        """
        ...

    def new_tokens(self, request: Request) -> float:
        """Estimate how many tokens of the prompt no worker has in its cache. It takes no longer than
        `choose`, changes nothing and never fails.
        """
        return float(request.prompt_tokens())

    def reckons_seconds(self) -> bool:
        """Tell whether `appraise` says what a request costs."""
        return False

    def appraise(self, request: Request, candidates: Sequence[Any]) -> Appraisal | None:
        """Reckon what the request would cost at the candidates, in seconds: where it prefills the time to the
        first token, where it decodes what the load adds to its answer. None if the policy does not.

        What it chooses next is what it would have chosen without the call.
        """
        return None

    def explain(self, request: Request, candidates: Sequence[Any]) -> Explanation | None:
        """Tell what `choose` would choose now. None if the policy cannot tell.

        What it chooses next is what it would have chosen without the call, if the source of chance is put
        back to where it was.
        """
        return None

    def ended(self, choice: Choice[Any], outcome: Outcome) -> None:  # noqa: B027  # most need not know
        """Hear that a leg has ended. It is called once for each `Choice` that was made with `policy`, and
        never fails.
        """

    def note_cache(self, worker: str, event: CacheEvent) -> None:  # noqa: B027  # most go by nothing of it
        """Hear what has become of a worker's cache; only a policy with `PolicySpec.hears_caches` does. It
        never fails.
        """

    def prediction(self, worker: str) -> Prediction | None:
        """Return how right the policy was of late about a worker's cache; None if it predicts nothing."""
        return None

    def hear(self, note: bytes) -> None:  # noqa: B027  # most share nothing
        """Hear what the same policy of another process has shared. It never fails, whatever the note is."""


def explained(choice: Choice[Any], candidates: Sequence[Any], terms: list[dict[str, float]]) -> Explanation:
    """Return what a choice, of which nothing may be left, tells with the `terms` of all candidates."""
    index = 0
    while candidates[index] is not choice.worker:
        index += 1
    return Explanation(index, str(choice), terms)


# --- what the config and the docs need to know --------------------------------------------------


class Argument:
    """A policy has arguments. Each has a default, so that a policy's name alone is enough."""

    __slots__ = ("choices", "default", "description", "least", "most", "name")

    def __init__(
        self,
        name: str,
        default: bool | int | float | str | list[str],
        description: str,
        *,
        least: float | None = None,
        most: float | None = None,
        choices: Sequence[str] = (),
    ) -> None:
        """Values are of the type of `default`; lists are of texts. `least` and `most` are the bounds of a
        number, `choices` are all that a text may be.
        """
        self.name = name
        self.default = default
        self.description = description
        self.least = least
        self.most = most
        self.choices = tuple(choices)


class PolicySpec:
    """This is a policy as the config knows it."""

    __slots__ = ("arguments", "description", "fault", "hears_caches", "make", "name")

    def __init__(
        self,
        name: str,
        make: Callable[..., Policy],
        description: str,
        arguments: Sequence[Argument] = (),
        fault: Callable[[Mapping[str, Any]], str | None] | None = None,
        *,
        hears_caches: bool = False,
    ) -> None:
        """`make(context, **arguments)` makes a policy; each argument is given by its name. `fault(arguments)`
        says what is wrong with arguments that are right each by itself, or None. `hears_caches` is True if it
        wants the KV events of workers.
        """
        self.fault = fault
        self.hears_caches = hears_caches
        self.name = name
        self.make = make
        self.description = description
        self.arguments: Final = tuple(arguments)
