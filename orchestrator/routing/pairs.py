"""The pair of workers at the least cost is found here, of costs that their policies have reckoned.

    cost = expected time to first token at the prefill worker
         + transfer
         + what the decode worker's load makes of the answer          all in seconds

Where all transfers take the same time, the pair is the cheapest of each role. Otherwise the cheapest of each
zone are looked at, and of small pools all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from orchestrator.routing.links import Links
from orchestrator.routing.policies.base import Appraisal, Choice, Policy, Request
from orchestrator.routing.revisions import Group
from orchestrator.workers.worker import Worker

SHORT: Final = 16  # workers of a role whose pairs are looked at


class Pair:
    """A pair has been found to cost the least. `str` of it says so."""

    __slots__ = ("decode", "decode_index", "decode_s", "prefill", "prefill_index", "prefill_s", "transfer_s")

    def __init__(self, prefill: Worker, prefill_index: int, decode: Worker, decode_index: int) -> None:
        """The indexes are those among the candidates."""
        self.prefill = prefill
        self.prefill_index = prefill_index
        self.decode = decode
        self.decode_index = decode_index
        self.prefill_s = 0.0
        self.transfer_s = 0.0
        self.decode_s = 0.0

    @property
    def cost_s(self) -> float:
        return self.prefill_s + self.transfer_s + self.decode_s

    def __str__(self) -> str:
        return (
            f"The pair of {self.prefill.name} and {self.decode.name} costs the least, {self.cost_s:.3f} s: "
            f"{self.prefill_s:.3f} to prefill, {self.transfer_s:.3f} for the transfer, {self.decode_s:.3f} "
            "for what the decode worker has to do."
        )

    def terms(self) -> dict[str, float]:
        return {
            "cost_s": self.cost_s,
            "prefill_s": self.prefill_s,
            "transfer_s": self.transfer_s,
            "decode_s": self.decode_s,
        }


def cheapest_pair(
    prefill: Appraisal,
    prefills: Sequence[Worker],
    decode: Appraisal,
    decodes: Sequence[Worker],
    links: Links,
    tokens: float,
    now: float,
) -> Pair:
    """Return the pair at the least cost of those that were appraised. `tokens` are those of the prompt."""
    firsts, seconds = short_list(prefill, prefills), short_list(decode, decodes)
    best = -1.0
    found_p = found_d = 0
    for p in firsts:
        cost_p, worker = prefill.costs[p], prefills[prefill.indexes[p]]
        for d in seconds:
            cost = cost_p + decode.costs[d]
            if 0.0 <= best <= cost:
                continue  # no transfer makes it less
            cost += links.seconds(worker, decodes[decode.indexes[d]], tokens, now)
            if best < 0.0 or cost < best:
                best, found_p, found_d = cost, p, d
    index_p, index_d = prefill.indexes[found_p], decode.indexes[found_d]
    pair = Pair(prefills[index_p], index_p, decodes[index_d], index_d)
    pair.prefill_s, pair.decode_s = prefill.costs[found_p], decode.costs[found_d]
    pair.transfer_s = links.seconds(pair.prefill, pair.decode, tokens, now)
    return pair


def short_list(appraisal: Appraisal, workers: Sequence[Worker]) -> list[int]:
    """Return which entries of an appraisal are looked at: the cheapest of each zone, and then the cheapest.

    Those that cost the same stay in their order.
    """
    costs, indexes = appraisal.costs, appraisal.indexes
    order = sorted(range(len(costs)), key=costs.__getitem__)
    if len(order) <= SHORT:
        return order
    zones: set[str | None] = set()
    firsts: list[int] = []
    others: list[int] = []
    for entry in order:
        zone = workers[indexes[entry]].zone
        if zone in zones or len(firsts) == SHORT:
            others.append(entry)
        else:
            zones.add(zone)
            firsts.append(entry)
    return firsts + others[: SHORT - len(firsts)]


class Joint:
    """A pair can be chosen that policies have appraised together; so far nothing is."""

    __slots__ = ("_decode", "group", "pair", "prices", "tokens")

    def __init__(self, group: Group, pair: Pair, prefill: Appraisal, decode: Appraisal) -> None:
        self.group = group  # of the workers that it is of
        self.pair = pair
        self.tokens = prefill.tokens  # of the prompt
        self.prices = prefill
        self._decode = decode

    def take_prefill(self) -> Choice[Worker]:
        return self.prices.take(self.pair.prefill_index, self.pair)

    def take_decode(self, links: Links, now: float) -> Choice[Worker]:
        """Choose the decode worker; the link to it will be measured."""
        links.note_tried(self.pair.prefill, self.pair.decode, now)
        return self._decode.take(self.pair.decode_index, self.pair)


def cheapest_joint(
    request: Request, groups: list[Group], prefill: Policy, decode: Policy, links: Links, now: float
) -> Joint | None:
    """Return the pair at the least cost of all groups; None if a policy does not reckon."""
    best: Joint | None = None
    for group in groups:
        prices, loads = prefill.appraise(request, group.prefill), decode.appraise(request, group.decode)
        if prices is None or loads is None:
            return None
        tokens = prices.tokens
        pair = cheapest_pair(prices, group.prefill, loads, group.decode, links, tokens, now)
        if best is None or pair.cost_s < best.pair.cost_s:
            best = Joint(group, pair, prices, loads)
    return best
