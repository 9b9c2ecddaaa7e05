"""A budget of GPUs is shared among the roles of all models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.scaling.roles import Wish


@dataclass(frozen=True, slots=True)
class Price:
    """A worker takes so many GPUs, and so many workers are there in any case."""

    gpus: int
    least: int


def within(wishes: Sequence[Wish], prices: Sequence[Price], most: int | None) -> list[Wish]:
    """Return what fits into `most` GPUs: whoever has the smallest part of what it wants gets the next one."""
    if most is None or sum(w.wanted * price.gpus for w, price in zip(wishes, prices, strict=True)) <= most:
        return list(wishes)
    granted = [min(wish.wanted, price.least) for wish, price in zip(wishes, prices, strict=True)]
    left = most - sum(count * price.gpus for count, price in zip(granted, prices, strict=True))
    while (place := _next(wishes, granted, prices, left)) is not None:
        granted[place] += 1
        left -= prices[place].gpus
    return [_cut(wish, count, most) for wish, count in zip(wishes, granted, strict=True)]


def _next(wishes: Sequence[Wish], granted: Sequence[int], prices: Sequence[Price], left: int) -> int | None:
    """Return who gets one worker more of what is left; None if there is too little for anybody."""
    parts = {
        place: granted[place] / wish.wanted
        for place, wish in enumerate(wishes)
        if granted[place] < wish.wanted and prices[place].gpus <= left
    }
    return min(parts, key=parts.__getitem__, default=None)


def _cut(wish: Wish, count: int, most: int) -> Wish:
    if count == wish.wanted:
        return wish
    return replace(wish, wanted=count, why=f"{wish.why}; {wish.wanted} do not fit into {most} GPUs")
