"""A frame is drawn for a terminal: the narrower it is, the fewer columns; nothing in a name steers it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rich.cells import cell_len, chop_cells
from rich.text import Text

from launch.operate.frame import Frame, rates
from launch.operate.rows import Row, ago, milliseconds, number, seats, state
from orchestrator.config.printing import one_line

if TYPE_CHECKING:
    from launch.remote import Run

NAME_LEAST: Final = 12  # cells: of a longer name the end is shown
GAP: Final = 2
_STATES: Final = {"ready": "green", "draining": "yellow", "suspect": "yellow", "starting": "yellow"}


@dataclass(frozen=True, slots=True)
class Column:
    """The greater its rank, the sooner a column is left out."""

    title: str
    rank: int
    cell: Callable[[Row, float], str]


_COLUMNS: Final = (
    Column("WORKER", 0, lambda row, now: row["name"]),
    Column("STATE", 0, lambda row, now: state(row)),
    Column("SINCE", 4, lambda row, now: ago(row["since"], now)),
    Column("SEATS", 1, lambda row, now: seats(row)),
    Column("REQ/S", 1, lambda row, now: number(row["rate"])),
    Column("1ST BYTE MS", 2, lambda row, now: milliseconds(row["first_byte_p50"], row["first_byte_p99"])),
    Column("TOKEN MS", 2, lambda row, now: milliseconds(row["inter_token_p50"], row["inter_token_p99"])),
    Column("ERR", 3, lambda row, now: number(row["errors"])),
    Column("RETRY", 5, lambda row, now: number(row["retries"])),
    Column("KV", 6, lambda row, now: number(row["transfers"])),
    Column("SERVED", 7, lambda row, now: number(row["served"])),
    Column("RESTART", 8, lambda row, now: number(row["restarts"])),
)


def drawn(
    frame: Frame, run: Run | None, before: Frame | None, width: int, height: int | None, problem: str | None
) -> list[Text]:
    """Return the lines of a frame, none of them wider than `width` cells.

    `height` bounds their number; None: as many as there are. `problem` is why the frame is an old one.
    """
    lines = [
        *_head(frame, run, before, width),
        *([Text(f"! {one_line(problem)}", "bold red")] if problem else []),
    ]
    tail = [*_keys(frame)]
    left = None if height is None else max(3, height - len(lines) - len(tail) - 1)
    lines += [Text(), *_workers(frame, width, left), *tail]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines if height is None else lines[:height]


def _head(frame: Frame, run: Run | None, before: Frame | None, width: int) -> Iterable[Text]:
    if run is not None:
        doing = f"  {run.state.operation}" if run.state.operation else ""
        up = f"up {ago(run.state.started, frame.time)}"
        yield Text(one_line(f"{run.state.url}  {up}{doing}"), "bold")
    now = rates(frame, before)
    told = [f"{frame.rate:.1f} requests/s"]
    for name, value in frame.totals.items():
        speed = f" ({now[name]:.1f}/s)" if name in now else ""
        told.append(f"{name.replace('_', ' ')} {value:.0f}{speed}")
    waiting = [f"{model} {count:.0f}" for model, count in frame.queue.items() if count]
    leases = [f"{lease} {count:.0f}" for lease, count in frame.leases.items()]
    if len(frame.data_processes) > 1:
        told.append(f"{len(frame.data_processes)} processes")
    told += [f"queue {', '.join(waiting) or 'empty'}", f"KV leases {', '.join(leases) or 'none'}"]
    yield from map(Text, _wrapped([one_line(part) for part in told], width))


def _wrapped(parts: Iterable[str], width: int) -> Iterable[str]:
    """Yield lines with as many parts in each as fit."""
    line = ""
    for part in parts:
        if line and cell_len(line) + GAP + cell_len(part) > width:
            yield line
            line = ""
        line += f"{' ' * GAP if line else ''}{part}"
    yield line


# --- workers --------------------------------------------------------------------------------------


def _workers(frame: Frame, width: int, height: int | None) -> Iterable[Text]:
    rows = _rows_in(frame.rows, height)
    cells = [[one_line(str(column.cell(row, frame.time))) for column in _COLUMNS] for row in rows]
    shown = _fitting(cells, width)
    widths = _widths(cells, shown, width)
    yield Text(_joined([_COLUMNS[index].title for index in shown], widths), "bold")
    for row, line in zip(rows, cells, strict=True):
        yield _line([line[index] for index in shown], widths, row)
    if len(rows) < len(frame.rows):
        yield Text(f"and {len(frame.rows) - len(rows)} more; a higher window shows them", "dim")


def _rows_in(rows: Sequence[Row], height: int | None) -> Sequence[Row]:
    """Return the rows that a window so high has room for, first those that are not well."""
    if height is None or len(rows) < height:
        return rows
    return sorted(rows, key=_is_well)[: height - 2]


def _is_well(row: Row) -> bool:
    return row["state"] == "ready" and not row["is_slow"]


def _fitting(cells: Sequence[Sequence[str]], width: int) -> list[int]:
    """Return which columns fit: as many as possible, the important ones first."""
    shown = list(range(len(_COLUMNS)))
    for index in sorted(shown, key=lambda index: -_COLUMNS[index].rank):
        if _COLUMNS[index].rank == 0 or sum(_widths(cells, shown, None)) + GAP * len(shown) <= width + GAP:
            break
        shown.remove(index)
    return shown


def _widths(cells: Sequence[Sequence[str]], shown: Sequence[int], width: int | None) -> list[int]:
    """Return the widths of the columns; that of the names is what is left of `width`."""
    widths = [max(map(cell_len, (_COLUMNS[index].title, *(row[index] for row in cells)))) for index in shown]
    if width is None:
        widths[0] = min(widths[0], NAME_LEAST)
    else:
        left = width - sum(widths[1:]) - GAP * (len(widths) - 1)
        widths[0] = max(NAME_LEAST, min(widths[0], left))
    return widths


def _line(cells: Sequence[str], widths: Sequence[int], row: Row) -> Text:
    name, told = _end_of(cells[0], widths[0]), cells[1]
    line = Text(_joined([name, *cells[1:]], widths))
    start = widths[0] + GAP - (cell_len(name) - len(name))
    style = "magenta" if row["is_slow"] else _STATES.get(row["state"], "red")
    line.stylize(style, start, start + len(told))
    return line


def _end_of(name: str, width: int) -> str:
    """Return the end of a name that is too long: its role and index are there."""
    if cell_len(name) <= width:
        return name
    reverse = name[::-1]
    return f"…{chop_cells(reverse, width - 1)[0][::-1]}"


def _joined(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell + " " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True))
    return (" " * GAP).join(padded).rstrip()


# --- keys -----------------------------------------------------------------------------------------


def _keys(frame: Frame) -> Iterable[Text]:
    if not frame.keys:
        return
    names = list(dict.fromkeys(name for values in frame.keys.values() for name in values))
    cells = [["KEY", *(name.upper().replace("_", " ") for name in names)]]
    cells += [
        [one_line(key), *(number(values.get(name)) for name in names)] for key, values in frame.keys.items()
    ]
    widths = [max(map(cell_len, column)) for column in zip(*cells, strict=True)]
    yield Text()
    for index, row in enumerate(cells):
        yield Text(_joined(row, widths), "" if index else "bold")
