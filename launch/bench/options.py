"""The options of `baton bench`, and what a profile means where they are silent. Imports next to nothing."""

from __future__ import annotations

import argparse
from typing import NamedTuple

from launch.bench.shapes import WORKLOADS

ABOUT = "load test of any OpenAI endpoint, with a P/D breakdown when the endpoint is Baton"
# `chat` has many streams, `mixed` has large prompts come in beside them.
STUDIES = {"transport": ("chat", "long-prompt", "agentic", "mixed"), "streams": ("chat", "mixed")}


class Profile(NamedTuple):
    """Defaults of what can be given as options."""

    about: str
    workloads: tuple[str, ...]
    duration_s: float  # of each step


PROFILES = {
    "quick": Profile("chat at one rate", ("chat",), 30.0),
    "full": Profile(
        "every shape at half the rate, the rate, and twice the rate",
        ("chat", "long-prompt", "multi-turn", "agentic"),
        30.0,
    ),
    "sustained": Profile("searches the highest rate within the SLO", ("chat",), 30.0),
    "matrix": Profile(
        "closed loop, so many clients at once; see --concurrency", ("chat", "long-prompt"), 10.0
    ),
}
STUDY = Profile("rounds of each endpoint in turn", (), 10.0)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "\n".join(_listing())
    parser.add_argument(
        "urls", metavar="URL", nargs="*", help="http://HOST:PORT; with --ab two or more LABEL=URL"
    )
    parser.add_argument(
        "--cacert", metavar="FILE", help="trust certificates that are signed by these, in PEM form"
    )
    _add_load(parser)
    _add_slo(parser)
    _add_results(parser)


def _add_load(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument("--profile", choices=PROFILES, default="quick", help="see below; default: quick")
    group.add_argument("--model", metavar="NAME", help="default: the endpoint's only one")
    group.add_argument(
        "--workload", metavar="NAMES", type=_names, help="one or more with commas between; see below"
    )
    group.add_argument(
        "--rate",
        metavar="R",
        type=_positive,
        default=4.0,
        help="chats per second; longer shapes come less often; sustained: where to start; default: 4",
    )
    group.add_argument("--duration", metavar="S", type=_positive, help="seconds of each step")
    group.add_argument(
        "--concurrency",
        metavar="N,...",
        type=_counts,
        default=(1, 4, 16, 64),
        help="matrix: clients at once; default: 1,4,16,64",
    )
    group.add_argument(
        "--seed", metavar="N", type=int, default=0, help="of the schedule and all lengths; default: 0"
    )
    group.add_argument(
        "--salt",
        metavar="TEXT",
        help="of the text; default: a new one each time, so that no cache knows the prompts",
    )
    group.add_argument(
        "--timeout", metavar="S", type=_positive, default=120.0, help="for a whole answer; default: 120"
    )


def _add_slo(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what a good request is")
    group.add_argument("--slo-ttft-ms", metavar="MS", type=_positive, default=1000.0, help="default: 1000")
    group.add_argument(
        "--slo-itl-ms",
        metavar="MS",
        type=_positive,
        default=100.0,
        help="mean time between a request's tokens; default: 100",
    )
    group.add_argument(
        "--slo-share",
        metavar="X",
        type=_share,
        default=0.95,
        help="sustained: so many must be good; default: 0.95",
    )


def _add_results(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument("--output", metavar="FILE", help="write the result as JSON")
    group.add_argument("--plot", metavar="FILE", help="draw it: .png, .svg or .pdf")
    group.add_argument("--compare", metavar="FILE", nargs=2, help="compare two results; measures nothing")
    group.add_argument("--ab", metavar="STUDY", choices=STUDIES, help=f"A/B test: {', '.join(STUDIES)}")
    group.add_argument("--rounds", metavar="N", type=_count, default=5, help="of an A/B test; default: 5")


def _listing() -> list[str]:
    return [
        "profiles:",
        *(f"  {name:12} {profile.about}" for name, profile in PROFILES.items()),
        "workloads:",
        *(f"  {name:12} {workload.about}" for name, workload in WORKLOADS.items()),
        "The key for the endpoint is read from BATON_API_KEY or OPENAI_API_KEY.",
    ]


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in WORKLOADS:
            raise argparse.ArgumentTypeError(f"no workload {name!r}; there are {', '.join(WORKLOADS)}")
    return names


def _counts(text: str) -> tuple[int, ...]:
    return tuple(map(_count, text.split(",")))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 up")
    return int(text)


def _positive(text: str) -> float:
    number = _number(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no positive number")
    return number


def _share(text: str) -> float:
    number = _number(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not between 0 and 1")
    return number


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from error
