"""Links are how long hand-offs take from one worker to another, as it was measured.

What is measured is the time from the writing of a streamed decode leg to the first event of its answer: the
decode worker fetches the KV cache in it, and makes one token. Nothing that reaches the orchestrator is nearer
to the transfer. A wait in the decode worker's queue is in it, too; it makes what is measured longer, never
shorter, so that what is longer than expected counts less. Whole answers show nothing of it.

    seconds = rate * (0.030 + 8e-6 * tokens)

The rate is learned for pairs of workers, for pairs of zones, and over all. A link that nobody has measured
lately counts as its pair of zones does, and that as all do; so does one that differs by little. Two zones
between which nobody has measured anything yet count a little less, so that they are tried, and much more
while a few requests are on their way there: these find out how the link is, not all that come meanwhile.
"""

from __future__ import annotations

from typing import Final

from orchestrator.workers.worker import Worker

# Seconds of a hand-off at a rate of 1: a decode step, and 320 KiB of KV cache per token at 40 GB/s, which is
# a 70B-class model over a 400 Gbit/s link.
FIXED_S: Final = 0.030
TOKEN_S: Final = 8e-6

# Rates: the newest hand-off has this weight, the first ones more, a small one less; one that took longer than
# expected has this part of it.
NEWEST: Final = 0.2
SURE: Final = 5  # hand-offs
LONGER: Final = 0.2
FEW: Final = 3  # hand-offs that say nothing yet of how a link differs from others
BAND: Final = 0.25  # a link differs if its rate is this far from that of the level above
LEAST_RATE: Final = 1e-4
MOST_RATE: Final = 1e4

UNTRIED: Final = 0.7  # of the mean, between zones of which nothing is known
ON_TRIAL: Final = 4.0  # the same while a few requests are on their way there: others go where it costs less
TRIAL_S: Final = 10.0  # for their first events; there may be none, as of whole answers, or of legs that fail
MOST_ZONES: Final = 64  # pairs of zones; of more not all are tried

FORGET_S: Final = 600.0  # nobody knows any more what was measured so long ago
LOOK_S: Final = 10.0  # how late it may be noticed that something was forgotten
MOST_PAIRS: Final = 4096  # of workers; of larger pools each pair is measured too rarely to know it


def expected_s(tokens: float) -> float:
    """Return how long the hand-off of so many tokens takes at a rate of 1."""
    return FIXED_S + TOKEN_S * tokens


class Link:
    """A link is from one worker or zone to another one, or the mean of all."""

    __slots__ = ("above", "differs", "measured", "rate", "seen")

    def __init__(self, above: Link | None) -> None:
        self.above = above  # what it counts as if it does not differ
        self.rate = 0.0
        self.seen = 0  # hand-offs
        self.measured = 0.0  # when it last was, or was tried
        self.differs = False  # from the level above

    def note(self, ratio: float, weight: float, now: float) -> None:
        """Note a hand-off that took `ratio` times what is expected; `weight` is at most 1."""
        if now - self.measured > FORGET_S:
            self.seen = 0
        self.measured = now
        self.seen += 1
        if self.seen == 1:
            self.rate = ratio
        else:
            gain = NEWEST if self.seen > SURE else 1.0 / self.seen
            self.rate += gain * weight * (LONGER if ratio > self.rate else 1.0) * (ratio - self.rate)

        self.compare()

    def try_again(self, now: float) -> None:
        """Note that it is about to be measured anew; until then it counts as it did."""
        self.measured = now
        self.seen = 0

    def compare(self) -> None:
        """Find out whether it differs."""
        above = self.above
        if above is not None and self.seen:
            relative = self.rate / above.rate
            is_outside = not 1.0 / (1.0 + BAND) <= relative <= 1.0 + BAND
            self.differs = is_outside and (self.differs or self.seen >= FEW)

    def is_known_to_differ(self, now: float) -> bool:
        return self.differs and now - self.measured <= FORGET_S


class Links:
    """These are the links of a model's workers, as this process has measured them."""

    def __init__(self, most_pairs: int = MOST_PAIRS) -> None:
        """At most `most_pairs` pairs of workers are known one by one."""
        self._most_pairs = most_pairs
        self.all = Link(None)
        self.are_equal = True  # none is known to differ: a pair need not be chosen together
        self._decode_zones: set[str] = set()
        self._zone_count = 0  # pairs
        self._zones: dict[str, dict[str, Link]] = {}  # by the prefill worker's zone and the decode worker's
        self._pairs: dict[str, dict[str, Link]] = {}  # by their names
        self._pair_count = 0
        # Of pairs of zones of which nothing is known: when the last requests were sent there.
        self._tried: dict[tuple[str, str], list[float]] = {}
        self._mean_s = 0.0  # expected, per hand-off
        self._looked = 0.0  # when what is known was last looked through

    def note(self, prefill: Worker, decode: Worker, tokens: float, seconds: float, now: float) -> None:
        """Note how long after its leg was written a decode worker has begun its answer."""
        expected = expected_s(tokens)
        self._mean_s += (expected - self._mean_s) * (0.05 if self._mean_s else 1.0)
        weight = min(expected / self._mean_s, 1.0)
        ratio = min(max(seconds / expected, LEAST_RATE), MOST_RATE)
        self.all.note(ratio, weight, now)
        zone = self._zone(prefill.zone or "", decode.zone or "")
        zone.note(ratio, weight, now)
        pair = self._pair(prefill.name, decode.name, zone)
        if pair is not None:
            pair.note(ratio, weight, now)
        if zone.differs or (pair is not None and pair.differs) or self._has_untried():
            self.are_equal = False
        if now - self._looked > LOOK_S:
            self._look(now)

    def seconds(self, prefill: Worker, decode: Worker, tokens: float, now: float) -> float:
        """Return how long a hand-off of so many tokens should take; 0 as long as none was measured."""
        return expected_s(tokens) * self._rate(prefill, decode, now)

    def mean_s(self, tokens: float) -> float:
        """Return the same of a hand-off between any two workers."""
        return expected_s(tokens) * self.all.rate

    def note_tried(self, prefill: Worker, decode: Worker, now: float) -> None:
        """Note that a link which nobody has measured, or not for long, is about to be. Until it was, one that
        was measured counts as it did, and one that never was counts more, so that not all try it at once.
        """
        for link in (
            _found(self._zones, prefill.zone or "", decode.zone or ""),
            _found(self._pairs, prefill.name, decode.name),
        ):
            if link is not None and link.differs and now - link.measured > FORGET_S:
                link.try_again(now)
        if not self.are_equal:
            self._note_trial(prefill.zone or "", decode.zone or "", now)

    def _note_trial(self, prefill: str, decode: str, now: float) -> None:
        """Note that a request is about to tell of two zones of which nothing is known."""
        is_new = _found(self._zones, prefill, decode) is None and not self._is_on_trial(prefill, decode, now)
        if is_new and (len(self._tried) < MOST_ZONES or (prefill, decode) in self._tried):
            tried = self._tried.get((prefill, decode), [])
            self._tried[prefill, decode] = [*tried[1 - FEW :], now]

    def _rate(self, prefill: Worker, decode: Worker, now: float) -> float:
        pair = _found(self._pairs, prefill.name, decode.name)
        if pair is not None and pair.is_known_to_differ(now):
            return pair.rate
        zone = _found(self._zones, prefill.zone or "", decode.zone or "")
        if zone is not None and zone.is_known_to_differ(now):
            return zone.rate
        return self.all.rate * (1.0 if zone is not None else self._unknown(prefill, decode, now))

    def _unknown(self, prefill: Worker, decode: Worker, now: float) -> float:
        """Return what part of the mean a link counts between zones of which nothing is known."""
        if self._zone_count >= MOST_ZONES:
            return 1.0
        return ON_TRIAL if self._is_on_trial(prefill.zone or "", decode.zone or "", now) else UNTRIED

    def _is_on_trial(self, prefill: str, decode: str, now: float) -> bool:
        """Tell whether enough requests are on their way between two zones to tell how the link is."""
        tried = self._tried.get((prefill, decode))
        return tried is not None and len(tried) >= FEW and now - tried[-FEW] <= TRIAL_S

    def _has_untried(self) -> bool:
        """Tell whether nothing is known between two zones of which something is."""
        return self._zone_count < min(len(self._zones) * len(self._decode_zones), MOST_ZONES)

    def _look(self, now: float) -> None:
        """Look through all links: the level above may have moved, and pairs may be forgotten."""
        self._looked = now
        self._tried = {zones: tried for zones, tried in self._tried.items() if now - tried[-1] <= TRIAL_S}
        found = [link for links in self._zones.values() for link in links.values()]
        if self._pair_count >= self._most_pairs:
            self._forget(now)
        for links in self._pairs.values():
            found += links.values()
        self.are_equal = not self._has_untried()
        for link in found:
            link.compare()
            if link.differs:
                self.are_equal = False

    def _zone(self, prefill: str, decode: str) -> Link:
        """Return the link between two zones."""
        found = _found(self._zones, prefill, decode)
        if found is None and self._zone_count >= self._most_pairs:
            return Link(self.all)  # nobody keeps it
        if found is None:
            self._decode_zones.add(decode)
            self._tried.pop((prefill, decode), None)
            self._zone_count += 1
            found = self._link(self._zones, prefill, decode, self.all)
        return found

    def _pair(self, prefill: str, decode: str, zone: Link) -> Link | None:
        """Return the link between two workers; None if there are too many to keep it."""
        found = _found(self._pairs, prefill, decode)
        if found is None and self._pair_count < self._most_pairs:
            self._pair_count += 1
            found = self._link(self._pairs, prefill, decode, zone)
        if found is not None:
            found.above = zone
        return found

    def _forget(self, now: float) -> None:
        """Forget pairs that were not measured for long."""
        left: dict[str, dict[str, Link]] = {}
        for name, links in self._pairs.items():
            kept = {other: link for other, link in links.items() if now - link.measured <= FORGET_S}
            if kept:
                left[name] = kept
        self._pairs = left
        self._pair_count = sum([len(links) for links in left.values()])

    def _link(self, table: dict[str, dict[str, Link]], prefill: str, decode: str, above: Link) -> Link:
        links = table.get(prefill)
        if links is None:
            links = table[prefill] = {}
        found = links.get(decode)
        if found is None:
            found = links[decode] = Link(above)
        return found


def _found(table: dict[str, dict[str, Link]], prefill: str, decode: str) -> Link | None:
    links = table.get(prefill)
    return None if links is None else links.get(decode)
