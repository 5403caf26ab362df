"""The events of one job as a person reads them, on stderr: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from knowledge_engine.cli.output import console, is_animated, size
from knowledge_engine.core import Checkpoint, JobEvent, JobState, JobWarning, LogLine, Progress, StateChange

PLAIN_SECONDS = 5.0  # between two plain progress lines of one phase


class JobView:
    """Shows what it is given; a context manager, so that the bar is taken down whatever happens.

    With `only_lines` there is no bar on a terminal either.
    """

    def __init__(self, title: str, *, output: Console | None = None, only_lines: bool = False) -> None:
        self._title = title
        self._console = output or console(stderr=True)
        self._is_animated = is_animated(self._console) and not only_lines
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}  # one bar for each phase
        self._phase = ""
        self._spoken = float("-inf")

    def __enter__(self) -> Self:
        if self._is_animated:
            columns = (TextColumn("{task.description:<24}"), BarColumn(24), TextColumn("{task.fields[facts]}"))
            self._bars = Bars(*columns, console=self._console, refresh_per_second=4)
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, event: JobEvent) -> None:
        match event.payload:
            case Progress() as progress:
                self.show_progress(progress)
            case LogLine(message=message):
                self.say(message)
            case Checkpoint(step=step, size_bytes=size_bytes):
                self.say(f"checkpoint at step {step} ({size(size_bytes)})")
            case JobWarning(message=message, reason=reason):
                self.say(f"warning: {message} [{reason}]")
            case StateChange(state=state, message=message):
                self._enter(state, message, event.job_id)
            case _:  # the result, which is printed at the end
                pass

    def show_progress(self, progress: Progress) -> None:
        """Moves the bar, or says a line: at once in a new phase, else every PLAIN_SECONDS and at its end."""
        facts = " ".join(describe(progress))
        is_new = progress.phase != self._phase
        self._phase = progress.phase
        if self._bars is not None:
            if progress.phase not in self._tasks:
                title = f"{self._title}: {progress.phase}"
                self._tasks[progress.phase] = self._bars.add_task(title, total=None, facts=facts)
            task = self._tasks[progress.phase]
            self._bars.update(task, completed=progress.step, total=progress.total_steps, facts=facts)
            return
        is_end = progress.step is not None and progress.step == progress.total_steps
        if is_new or is_end or time.monotonic() - self._spoken >= PLAIN_SECONDS:
            self._spoken = time.monotonic()
            self.say(f"{progress.phase} {facts}".rstrip())

    def _enter(self, state: JobState, message: str, job: str) -> None:
        line = f"{state.value}{f': {message}' if message else ''}"
        if state is JobState.PAUSED:
            line += f"; `knowledge-engine jobs resume {job}` goes on with it"
        self.say(line)
        if state in (JobState.PAUSED, JobState.QUEUED):  # nothing moves until it runs again
            if self._bars is not None and self._phase:
                self._bars.update(self._tasks[self._phase], facts=state.value.lower())
            self._phase = ""

    def show_all(self, events: Iterable[JobEvent]) -> None:
        for event in events:
            self.show(event)

    def say(self, line: str) -> None:
        # Text, as brackets in a message are no markup.
        self._console.print(Text(f"{self._title}: {line}"))


def describe(progress: Progress) -> list[str]:
    """The known numbers of a progress event, such as `12/90`, `loss 1.234`, `160 tokens/s`, `1:05 left`."""
    facts = []
    if progress.step is not None:
        facts.append(f"{progress.step}/{progress.total_steps}" if progress.total_steps else str(progress.step))
    if progress.loss is not None:
        facts.append(f"loss {progress.loss:.3f}")
    if progress.eval_loss is not None:
        facts.append(f"eval loss {progress.eval_loss:.3f}")
    if progress.tokens_per_second is not None:
        facts.append(f"{progress.tokens_per_second:.0f} tokens/s")
    elif progress.examples_per_second is not None:
        facts.append(f"{progress.examples_per_second:.1f}/s")
    if progress.eta_seconds is not None:
        minutes, seconds = divmod(round(progress.eta_seconds), 60)
        facts.append(f"{minutes}:{seconds:02} left")
    return facts
