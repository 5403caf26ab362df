"""A job on the whole terminal: its curves, how far it is and what it said last, drawn again in place as events come.

`frame` is the picture of one moment, for any size; `LiveView` keeps it on the terminal's other screen, and gives the
terminal back as it was, however it ends.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from types import FrameType, TracebackType
from typing import Any, NamedTuple, NoReturn, Self

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from knowledge_engine.cli.course import Course
from knowledge_engine.cli.curves import Plot, plot, short
from knowledge_engine.cli.output import console, size, span
from knowledge_engine.core import Job, JobEvent, JobKind, JobState, TrainingSpec

WIDE = 120  # from here on the curves stand side by side

_REFRESHES_PER_SECOND = 4
_GUTTER = 8  # of a curve's labels
_MIN_PLOT_ROWS = 2
_STATE_STYLES = {
    JobState.RUNNING: "bold green",
    JobState.SUCCEEDED: "bold green",
    JobState.FAILED: "bold red",
    JobState.CANCELLED: "bold red",
}
_ENTRY_STYLES = {"state": "bold", "warning": "yellow", "checkpoint": "cyan", "log": ""}
_HINT = "Ctrl-C leaves the job running"


class _Chart(NamedTuple):
    title: str
    series: tuple[tuple[str, str, str], ...]
    """Of each curve its metric, its name in the legend, and its colour."""


_LOSS = (("loss", "train", "cyan"), ("eval_loss", "held out", "yellow"))
_RATE = _Chart("learning rate", (("learning_rate", "", "green"),))
_SPEED = _Chart("tokens per second", (("tokens_per_second", "", "magenta"),))
_MADE = _Chart("conversations per second", (("examples_per_second", "", "cyan"),))


class LiveView:
    """Shows what it is given; a context manager. The last picture stays on the terminal when the job has ended."""

    def __init__(self, job: Job, *, output: Console | None = None) -> None:
        self._course = Course(job)
        self._console = output or console(stderr=True)
        self._lock = threading.Lock()  # events come on one thread, pictures are drawn on another
        self._notice = ""
        self._live = Live(
            console=self._console,
            screen=True,
            get_renderable=self._picture,
            refresh_per_second=_REFRESHES_PER_SECOND,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            # Unhandled they would leave the terminal on its other screen, without a cursor.
            self._handlers = {number: signal.signal(number, _end) for number in (signal.SIGTERM, signal.SIGHUP)}
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None:
            width, height = self._console.size
            self._console.print(Group(*frame(self._course, width, height - 1)))

    def show_all(self, events: Iterable[JobEvent]) -> None:
        for event in events:
            with self._lock:
                self._course.add(event)
                self._notice = ""

    def say(self, line: str) -> None:
        """Shows a line in the last row, until the next event comes."""
        with self._lock:
            self._notice = line

    def _picture(self) -> Group:
        width, height = self._console.size
        with self._lock:
            lines = frame(self._course, width, height - 1)
            return Group(*lines, Text(self._notice or _HINT, "yellow" if self._notice else "dim", no_wrap=True))


def frame(course: Course, width: int, height: int) -> list[Text]:
    """`height` lines of at most `width` characters: a head, the curves, and the newest of what was said."""
    head = [_title(course, width), _advance(course, width), _facts(course)]
    num_entries = min(max(3, height // 5), 12)
    charts = _charts(course, width, height - len(head) - num_entries)
    entries = [_entry(course, index) for index in range(len(course.entries))[len(head) + len(charts) - height :]]
    lines = [*head, *charts, *entries][:height]
    lines += [Text() for _ in range(height - len(lines))]
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines


# --- the head -----------------------------------------------------------------------------------------------------


def _title(course: Course, width: int) -> Text:
    spec, job = course.job.spec, course.job
    if isinstance(spec, TrainingSpec):
        what = f"{spec.base_model} learns {spec.dataset}, to be {spec.model}"
    else:
        what = f"{spec.num_conversations:,} conversations from {spec.catalogue}, to be {spec.dataset}"
    state = course.state.value + (f", attempt {course.attempt}" if course.attempt > 1 else "")
    left = Text.assemble((job.id, "bold"), f"  {_printable(what)}")
    left.truncate(max(1, width - len(state) - 2), overflow="ellipsis", pad=True)
    return left.append(f"  {state}", _STATE_STYLES.get(course.state, "bold yellow"))


def _advance(course: Course, width: int) -> Text:
    progress = course.progress
    if progress is None:
        return Text("not started yet", "dim")
    if course.state.is_terminal:
        spent = [attempt.end_time - attempt.start_time for attempt in course.attempts if attempt.end_time is not None]
        return Text(f"worked for {span(sum(part.total_seconds() for part in spent))}")
    if not progress.total_steps or progress.step is None:
        return Text(progress.phase)
    share = min(1.0, progress.step / progress.total_steps)
    left = "" if progress.eta_seconds is None else f"  {span(progress.eta_seconds)} left"
    words = f"{progress.phase} {progress.step:,}/{progress.total_steps:,}"
    numbers = f" {share:4.0%}{left}"
    room = min(40, max(0, width - len(words) - len(numbers) - 2))
    done = round(share * room)
    return Text.assemble(f"{words} ", ("━" * done, "green"), ("─" * (room - done), "dim"), numbers)


def _facts(course: Course) -> Text:
    progress = course.progress
    facts = []
    if progress is not None:
        facts = [
            None if progress.epoch is None else f"epoch {progress.epoch:.2f}",
            None if progress.memory_bytes is None else f"memory {size(progress.memory_bytes)}",
            None if progress.grad_norm is None else f"gradient norm {short(progress.grad_norm)}",
        ]
    if course.checkpoints:
        facts.append(f"checkpoint at step {course.checkpoints[-1].checkpoint.step:,}")
    if course.warnings:
        facts.append(f"{len(course.warnings)} warning{'s' if len(course.warnings) > 1 else ''}")
    return Text(" · ".join(filter(None, facts)))


def _entry(course: Course, index: int) -> Text:
    entry = course.entries[index]
    return Text.assemble(
        (f"{entry.time.astimezone():%H:%M:%S} ", "dim"), (_printable(entry.text), _ENTRY_STYLES[entry.kind])
    )


def _printable(text: str) -> str:
    """A line of somebody else's text that moves no cursor and changes no colour."""
    return "".join(character if character.isprintable() else " " for character in text)


# --- the curves ---------------------------------------------------------------------------------------------------


def _charts(course: Course, width: int, height: int) -> list[Text]:
    """At most `height` lines; none where they would show nothing."""
    if course.job.kind is JobKind.GENERATION:
        return _chart(course, _MADE, width, min(height, 12))
    spec = course.job.spec
    assert isinstance(spec, TrainingSpec)
    loss = _Chart(f"loss, {spec.method.loss_unit}", _LOSS)
    half = (height - 1) // 2
    if width >= WIDE:
        right = width * 2 // 5
        small = [_chart(course, chart, right, half) for chart in (_RATE, _SPEED)]
        column = [line for lines in small for line in lines]
        return _beside(_chart(course, loss, width - right - 2, 2 * half), column, width - right)
    lower = height * 2 // 5
    if lower < _MIN_PLOT_ROWS + 2:
        return _chart(course, loss, width, height)
    rate, speed = (_chart(course, chart, (width - 2) // 2, lower) for chart in (_RATE, _SPEED))
    return _chart(course, loss, width, height - lower) + _beside(rate, speed, (width + 2) // 2)


def _beside(left: Sequence[Text], right: Sequence[Text], at: int) -> list[Text]:
    """Two columns of lines; the right one begins at character `at`."""
    lines = []
    for number in range(max(len(left), len(right))):
        line = left[number].copy() if number < len(left) else Text()
        line.truncate(at, pad=True)
        lines.append(line.append_text(right[number]) if number < len(right) else line)
    return lines


def _chart(course: Course, chart: _Chart, width: int, height: int) -> list[Text]:
    """A title with the newest values, the curves beside their labels, and the steps below: `height` lines in all."""
    rows = height - 2
    if rows < _MIN_PLOT_ROWS or width < 2 * _GUTTER:
        return []
    title = Text(chart.title, "bold")
    for metric, name, colour in chart.series:
        if curve := course.curves[metric]:
            at = f" at {curve[-1].x:,.0f}" if metric == "eval_loss" else ""
            title.append(f"  {name} " if name else "  ").append(f"{short(curve[-1].y)}{at}", colour)
    curves = [course.curves[metric] for metric, _, _ in chart.series]
    drawn = plot(curves, width - _GUTTER, rows)
    if drawn is None:
        return [title, Text("no value yet", "dim"), *(Text() for _ in range(rows))]
    steps = [point.x for curve in curves for point in curve]
    first, last = f"{min(steps):,.0f}", f"{max(steps):,.0f}"
    axis = f"{'step':>{_GUTTER - 2}}  {first}{last:>{max(1, width - _GUTTER - len(first))}}"
    return [title, *_labelled(drawn, [colour for _, _, colour in chart.series]), Text(axis, "dim")]


def _labelled(drawn: Plot, colours: Sequence[str]) -> list[Text]:
    lines = []
    for number, (row, owners) in enumerate(zip(drawn.rows, drawn.owners, strict=True)):
        is_top, is_bottom = number == 0, number == len(drawn.rows) - 1
        label = short(drawn.high) if is_top else short(drawn.low) if is_bottom else ""
        line = Text.assemble((f"{label:>{_GUTTER - 2}}{'┤' if label else '│'} ", "dim"))
        for owner, run in groupby(zip(owners, row, strict=True), key=itemgetter(0)):
            line.append("".join(character for _, character in run), colours[owner] if owner >= 0 else None)
        lines.append(line)
    return lines


def _end(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
