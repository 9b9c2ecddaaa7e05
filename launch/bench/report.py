"""Results as text: one step as a block, several as a table, and what the reader must be warned of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from launch.bench.compare import Row, name_of
from launch.bench.results import NAMES, AbResult, ClientLoad, Ratio, Result, Spread, Step
from launch.bench.sample import Slo

# A client over this share of a core is near its own limit, and measures itself.
_CPU_LIMIT = 0.8
# Beyond this the schedule is not the one that was asked for.
_LATE_LIMIT_MS = 20.0
# As a share of the step: beyond this it mostly shows how the endpoint fills up and drains.
_LONG_ANSWER = 0.25

_COLUMNS = ("mean", "p50", "p90", "p99", "max")


def report(result: Result) -> str:
    """All of a result; the parts are apart by an empty line."""
    steps, slo = result.steps, result.setup.slo
    parts = [_head(result)]
    if len(steps) == 1:
        parts.append(_block(steps[0], slo))
    elif steps:
        parts += [_table(_step_rows(steps)), *_stage_table(steps)]
    parts += _lines(_sustained(result), [line for step in steps for line in _errors(step)])
    parts += _lines([line for step in steps for line in _warnings(step)])
    return "\n\n".join(parts)


def report_comparison(rows: Sequence[Row], differences: Sequence[str]) -> str:
    table: list[Sequence[str]] = [("step", "metric", "A", "B", "B / A")]
    table += [(row.step, row.metric, _number(row.a), _number(row.b), _ratio(row.ratio)) for row in rows]
    warning = [f"warning: A and B differ in {line}" for line in differences]
    return "\n\n".join([_table(table, text_columns=2), *_lines(warning)])


def report_ab(result: AbResult) -> str:
    first = next(iter(result.arms))
    head = f"{result.study}: {result.rounds} rounds, ratios to {first}: median (lowest to highest round)"
    table: list[Sequence[str]] = [("workload", "metric", "arm", "ratio", f"{first} to itself", "")]
    table += [_ab_row(ratio) for ratio in result.ratios]
    warnings = [
        f"{label}: {line}"
        for label, steps in result.steps.items()
        for step in steps
        for line in (*_errors(step), *_warnings(step))
    ]
    return "\n\n".join([head, _table(table, text_columns=3), *_lines(dict.fromkeys(warnings))])


# --- one step -----------------------------------------------------------------------------------


def _head(result: Result) -> str:
    setup = result.setup
    length = "of fixed length" if setup.fixed_length else "as long as the model likes"
    slo = f"TTFT <= {setup.slo.ttft_ms:g} ms, ITL <= {setup.slo.itl_ms:g} ms"
    return f"{setup.model} at {result.url}; seed {setup.seed}; answers {length}; good: {slo}"


def _block(step: Step, slo: Slo) -> str:
    rows: list[Sequence[str]] = [("ms", *_COLUMNS)]
    rows += [_spread_row(NAMES[name], spread) for name, spread in step.times.items()]
    rows += [_spread_row(f"server: {name}", spread) for name, spread in step.stages.items()]
    lines = [
        f"{name_of(step)}: {step.ok} of {step.requests} answered in {step.seconds:.1f} s",
        f"{step.rate:.2f} answers/s, {step.goodput:.2f} good/s, {step.token_rate:.0f} tokens/s",
        f"{_tokens(step)}; {_client(step.client)}",
        *([f"paths: {_counts(step.paths)}"] if step.paths else []),
    ]
    return "\n".join(lines) + "\n\n" + _table(rows)


def _tokens(step: Step) -> str:
    if not step.prompt_tokens:
        return "the endpoint counts no tokens"
    mean = step.prompt_tokens / step.ok, step.output_tokens / step.ok
    return f"prompts of {mean[0]:.0f} tokens ({_cached(step):.0%} cached), answers of {mean[1]:.0f}"


def _cached(step: Step) -> float:
    return step.cached_tokens / step.prompt_tokens if step.prompt_tokens else 0.0


def _client(client: ClientLoad) -> str:
    return f"client: {client.cpu:.0%} of a core, {client.connects} connections, {client.reuses} reused"


def _spread_row(name: str, spread: Spread) -> tuple[str, ...]:
    return (name, *(_number(getattr(spread, column)) for column in _COLUMNS))


# --- several steps ------------------------------------------------------------------------------


def _step_rows(steps: Iterable[Step]) -> Iterator[tuple[str, ...]]:
    yield (
        *("step", "ok", "errors", "ans/s", "good/s", "tok/s", "cached", "TTFT p50", "p99", "ITL p50", "p99"),
        *("e2e p50", "p99", "late p99", "CPU"),
    )
    for step in steps:
        yield (
            name_of(step),
            str(step.ok),
            str(step.requests - step.ok),
            *(_number(value) for value in (step.rate, step.goodput, step.token_rate)),
            f"{_cached(step):.0%}",
            *(_time(step, name, at) for name in ("ttft", "itl", "e2e") for at in ("p50", "p99")),
            _time(step, "late", "p99"),
            f"{step.client.cpu:.0%}",
        )


def _stage_table(steps: Iterable[Step]) -> Iterator[str]:
    rows = [
        (name_of(step), name, *(_number(getattr(spread, column)) for column in _COLUMNS))
        for step in steps
        for name, spread in step.stages.items()
    ]
    if rows:
        yield _table([("step", "server, ms", *_COLUMNS), *rows], text_columns=2)


def _time(step: Step, name: str, at: str) -> str:
    return _number(getattr(step.times[name], at)) if name in step.times else "-"


def _sustained(result: Result) -> Iterator[str]:
    share = result.setup.slo.share
    for workload, rate in result.sustained.items():
        found = f"{rate:.3g} req/s sustained" if rate else "no rate could be sustained"
        yield f"{workload}: {found} ({share:.0%} good)"


def _errors(step: Step) -> Iterator[str]:
    for kind, number in step.errors.items():
        detail = step.error_details.get(kind)
        yield f"{name_of(step)}: {number} x {kind}" + (f", the first: {detail}" if detail else "")


def _warnings(step: Step) -> Iterator[str]:
    start, late_ms = f"warning: {name_of(step)}:", step.times["late"].p99
    if step.client.cpu > _CPU_LIMIT:
        yield f"{start} this client was the limit, not the endpoint: it took {step.client.cpu:.0%} of a core"
    if late_ms > _LATE_LIMIT_MS:
        yield f"{start} this machine was busy: 1 % of the requests were sent over {late_ms:.0f} ms late"
    if "e2e" in step.times and step.times["e2e"].p50 > _LONG_ANSWER * step.seconds * 1e3:
        yield f"{start} too short for answers that take so long, see --duration"


def _ab_row(ratio: Ratio) -> tuple[str, ...]:
    found = f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f})"
    noise = f"{ratio.noise_low:.3f} to {ratio.noise_high:.3f}"
    verdict = "beyond noise" if ratio.is_beyond_noise else ""
    return ratio.workload, ratio.metric, ratio.arm, found, noise, verdict


# --- text ---------------------------------------------------------------------------------------


def _table(rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """Columns as wide as they must be; all but the first few to the right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        aligned = (
            cell.ljust(width) if at < text_columns else cell.rjust(width)
            for at, (cell, width) in enumerate(cells)
        )
        lines.append("  ".join(aligned).rstrip())
    return "\n".join(lines)


def _lines(*groups: Iterable[str]) -> Iterator[str]:
    """Each group that has lines, as one part."""
    return (part for part in map("\n".join, groups) if part)


def _number(value: float) -> str:
    """Three digits that matter, or all before the point."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {number}" for name, number in counts.items())
