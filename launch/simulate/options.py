"""The options of `baton simulate`. Imports next to nothing."""

from __future__ import annotations

import argparse

ABOUT = "replay a trace against CONFIG in virtual time, with the orchestrator's own routing"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all but CONFIG and `--set`, which every command that takes CONFIG has."""
    _add_load(parser.add_argument_group("load"))
    _add_variants(parser.add_argument_group("what is compared"))
    _add_engines(parser.add_argument_group("engines"))
    _add_results(parser.add_argument_group("results"))


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--trace",
        metavar="FILE",
        help="requests in Mooncake's format (JSON lines), in Azure's (CSV), or of our own log.decisions",
    )
    group.add_argument(
        "--rate", metavar="X", type=_positive, default=1.0, help="times the trace's own rate; default: 1"
    )
    group.add_argument("--model", metavar="NAME", help="default: the first one of CONFIG")
    group.add_argument(
        "--seeds",
        metavar="N",
        type=_count,
        default=1,
        help="runs of each variant, with other noise; default: 1",
    )
    group.add_argument(
        "--warm-up",
        metavar="SHARE",
        type=_share,
        default=0.1,
        help="of the time, at its beginning: requests that come then are not counted; default: 0.1",
    )


def _add_variants(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--policies",
        metavar="NAMES",
        type=_names,
        help="variants of routing with commas between: PREFILL, PREFILL+DECODE, either with @MODE of "
        "routing.disaggregate; default: as CONFIG says",
    )
    group.add_argument("--prefill", metavar="N", type=_whole, help="so many prefill workers, 0 for none")
    group.add_argument("--decode", metavar="N", type=_count, help="so many decode workers")
    group.add_argument(
        "--slo-ttft",
        metavar="S",
        type=_positive,
        help="a good TTFT in seconds; default: 5, with --scale as `scaling` says",
    )
    group.add_argument(
        "--slo-tpot",
        metavar="S",
        type=_positive,
        help="a good TPOT in seconds; default: 0.1, with --scale as `scaling` says",
    )
    group.add_argument(
        "--slo-share",
        metavar="SHARE",
        type=_share,
        help="so many requests are to be good; default: 0.9 with --advise, 0.95 with --scale",
    )


def _add_engines(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--start-s",
        metavar="S",
        type=_not_negative,
        default=60.0,
        help="--scale: a worker serves so long after it is wanted; default: 60",
    )
    group.add_argument(
        "--noise",
        metavar="SIGMA",
        type=_not_negative,
        default=0.1,
        help="standard deviation of the logarithm of a prefill's time; default: 0.1",
    )
    group.add_argument(
        "--slow",
        metavar="WORKER=FACTOR",
        type=_slow,
        action="append",
        default=[],
        help="this worker takes so many times as long, e.g. m/prefill/3=5; may be repeated",
    )
    group.add_argument(
        "--zones",
        metavar="NAMES",
        type=_names,
        default=(),
        help="the workers of each pool are in these zones in turn, e.g. east,west; default: as CONFIG says",
    )
    group.add_argument(
        "--between-zones",
        metavar="FACTOR",
        type=_positive,
        default=1.0,
        help="a hand-off between two zones takes so many times as long as within one; default: 1",
    )
    group.add_argument(
        "--link",
        metavar="ZONE:ZONE=FACTOR",
        type=_link,
        action="append",
        default=[],
        help="it takes so many times as long between these two, e.g. east:west=20; may be repeated",
    )
    group.add_argument(
        "--calibrate",
        metavar="FILE",
        help="fit the times to this result of `baton bench --output`, and say how far off they are",
    )


def _add_results(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-o", dest="form", choices=("table", "json"), default="table", help="default: table")
    group.add_argument(
        "--advise", action="store_true", help="find the fewest workers with which enough requests are good"
    )
    group.add_argument(
        "--scale",
        action="store_true",
        help="have workers come and go as `scaling` of CONFIG wants, and compare that with the fewest that "
        "are always there",
    )


# --- values -------------------------------------------------------------------------------------


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(text.split(",")))


def _slow(text: str) -> tuple[str, float]:
    name, _, factor = text.rpartition("=")
    if not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not WORKER=FACTOR")
    return name, _positive(factor)


def _link(text: str) -> tuple[frozenset[str], float]:
    names, _, factor = text.rpartition("=")
    zones = frozenset(filter(None, names.split(":")))
    if len(zones) != 2 or names.count(":") != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not ZONE:ZONE=FACTOR, of two zones")
    return zones, _positive(factor)


def _count(text: str) -> int:
    return _from(1, text)


def _whole(text: str) -> int:
    return _from(0, text)


def _from(least: int, text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) >= least):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
    return int(text)


def _positive(text: str) -> float:
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return number


def _not_negative(text: str) -> float:
    number = _number(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is negative or not finite")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 0 up and below 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
