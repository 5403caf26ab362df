"""Curves in a terminal: what they show, what they leave out, and what is left of the terminal afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from knowledge_engine.cli.course import MAX_POINTS, Course
from knowledge_engine.cli.curves import Plot, Point, plot, short, thin, ticks
from knowledge_engine.cli.live import WIDE, frame
from knowledge_engine.cli.report import collect, render
from knowledge_engine.client import Client
from knowledge_engine.core import JobState, LogLine, Progress, TrainingMethod, TrainingSpec
from knowledge_engine.server import convert
from knowledge_engine.v1 import jobs_pb2
from tests.fakes_server import ScriptedServer, scripted_server
from tests.recorded import JOB, NOON, Recorder, record_generation, record_training
from tests.running import end, start
from tests.tiny import build_tiny_base

OTHER_SCREEN, FIRST_SCREEN, NO_CURSOR, CURSOR = "\x1b[?1049h", "\x1b[?1049l", "\x1b[?25l", "\x1b[?25h"
BRAILLE = re.compile("[\u2801-\u28ff]")

# --- curves -------------------------------------------------------------------------------------------------------


def _points(*values: float) -> list[Point]:
    return [Point(number, value) for number, value in enumerate(values)]


def _plot(*series: list[Point], width: int = 10, height: int = 2) -> Plot:
    drawn = plot(series, width, height)
    assert drawn is not None
    assert [len(row) for row in drawn.rows] == [width] * height
    return drawn


def test_a_rising_line_goes_from_the_lower_left_to_the_upper_right() -> None:
    assert _plot(_points(0, 1), width=4, height=2).rows == ["  ⡠⠊", "⡠⠊  "]


def test_a_constant_is_a_line_in_the_middle() -> None:
    drawn = _plot(_points(5, 5, 5), height=3)
    assert (drawn.low, drawn.high) == (4.5, 5.5)
    assert [bool(row.strip()) for row in drawn.rows] == [False, True, False]


@pytest.mark.parametrize("points", [[], _points(math.nan, math.inf), [Point(0, -math.inf)]], ids=["none", "nan", "inf"])
def test_nothing_finite_is_no_plot(points: list[Point]) -> None:
    assert plot([points], 10, 2) is None


def test_what_is_not_finite_is_a_gap() -> None:
    rows = _plot(_points(1, 1, math.nan, 1, 1), width=9, height=1).rows
    assert BRAILLE.search(rows[0][:3])
    assert not rows[0][4].strip()
    assert BRAILLE.search(rows[0][6:])


def test_runs_are_not_joined_and_may_go_back() -> None:
    first, second = [Point(x, 0.0, 1) for x in range(3)], [Point(x, 9.0, 2) for x in range(1, 5)]
    rows = _plot(first + second, height=3).rows
    assert not rows[1].strip(), "no line leads from one run to the other"
    assert rows[2].rstrip() == rows[2][:6].rstrip()


def test_the_later_series_owns_what_both_touch() -> None:
    owners = _plot(_points(0, 0), _points(0, 1)).owners
    assert owners[1][0] == 1
    assert owners[1][-1] == 0
    assert owners[0][0] == -1


@pytest.mark.parametrize("at", [0, 1, 4_321, 9_998, 9_999])
@pytest.mark.parametrize("spike", [-50.0, 50.0])
def test_one_spike_among_ten_thousand_is_kept(at: int, spike: float) -> None:
    values = [math.sin(number / 1000) for number in range(10_000)]
    values[at] = spike
    points = _points(*values)
    kept = thin(points, 200)
    assert len(kept) <= 202
    assert points[at] in kept
    assert kept[0] == points[0]
    assert kept[-1] == points[-1]
    drawn = _plot(points, width=20, height=4)
    assert spike in (drawn.low, drawn.high)
    row = drawn.rows[0 if spike > 0 else -1]
    assert row[round(at / 9_999 * 39) // 2].strip()


def test_few_points_are_all_kept() -> None:
    points = _points(1, math.nan, 3)
    assert thin(points, 3)[0::2] == points[0::2]
    assert math.isnan(thin(_points(*[math.nan] * 100), 10)[5].y)


def test_numbers_beyond_a_float_s_reach_are_drawn() -> None:
    drawn = _plot(_points(-1.7e308, 1.7e308))
    assert drawn.rows[0][-1].strip()
    assert drawn.rows[-1][0].strip()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.31, 3.2, [0.5, 1, 1.5, 2, 2.5, 3]),
        (1, 300, [50, 100, 150, 200, 250, 300]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high, 6 if high == 300 else 5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.9123, "0.912"), (161.4, "161"), (12_400.2, "12,400"), (2e-4, "2e-4"), (0, "0"), (-1.5e9, "-1.5e9")],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


# --- frames -------------------------------------------------------------------------------------------------------


def _frame(course: Course, width: int, height: int) -> list[str]:
    lines = frame(course, width, height)
    assert len(lines) == height
    assert all(line.cell_len <= width for line in lines)
    return [line.plain for line in lines]


def test_eighty_columns_show_everything() -> None:
    text = "\n".join(_frame(Course.of(JOB, record_training()), 80, 23))
    for words in (
        "job-7f3a  base learns talks, to be assistant",
        "RUNNING, attempt 2",
        "training 229/300",
        "76%  1 min 25 s left",
        "memory 3.2 GiB",
        "checkpoint at step 200",
        "loss, nats per token  train 0.",
        "held out 0.756 at 225",
        "learning rate  4.7e-5",
        "tokens per second  1",
        "QUEUED: worker killed by signal 9",
        "warning: the newest checkpoint is damaged",
    ):
        assert words in text, words
    assert len(BRAILLE.findall(text)) > 100
    preferring = JOB.model_copy(update={"spec": JOB.spec.model_copy(update={"method": TrainingMethod.DPO})})
    assert "loss, nats per preference  train 0." in "\n".join(_frame(Course.of(preferring, record_training()), 80, 23))


def test_the_curve_begins_at_the_first_step_and_shows_the_spike() -> None:
    lines = _frame(Course.of(JOB, record_training()), 80, 23)
    loss = next(number for number, line in enumerate(lines) if line.startswith("loss"))
    assert float(lines[loss + 1][:6]) > 5, "the spike at step 85"
    column = next(at for at, character in enumerate(lines[loss + 1]) if BRAILLE.match(character))
    assert abs((column - 8) / 72 - 84 / 228) < 0.03
    (axis,) = [line for line in lines if line.startswith("  step") and "step" not in line[10:]]
    assert axis.split() == ["step", "1", "229"]


def test_a_wide_terminal_shows_the_curves_side_by_side() -> None:
    course = Course.of(JOB, record_training())
    (line,) = [line for line in _frame(course, WIDE, 40) if line.startswith("loss")]
    assert "learning rate" in line
    assert not [line for line in _frame(course, WIDE - 1, 40) if "loss" in line and "learning rate" in line]


@pytest.mark.parametrize("height", [1, 2, 5, 8, 12, 23, 70])
@pytest.mark.parametrize("width", [1, 10, 40, 80, 119, 120, 300])
def test_any_size_is_kept_to(width: int, height: int) -> None:
    for record in (record_training(), record_training()[:3], record_generation()):
        _frame(Course.of(JOB, record), width, height)


def test_a_generation_shows_its_rate_and_what_was_rejected() -> None:
    recorder = Recorder(record_generation())
    text = "\n".join(_frame(Course.of(recorder.job, recorder.events), 80, 23))
    assert "60 conversations from garden, to be talks" in text
    assert "conversations per second" in text
    assert "conversation 3: WRONG_PRICE" in text
    assert BRAILLE.search(text)


def test_text_of_others_moves_no_cursor() -> None:
    recorder = Recorder(record_training()[:3])
    recorder.add(LogLine(message="\x1b[2J\x1b]0;owned\x07\r\nnext [bold]\u202etxt 中文"))
    lines = frame(Course.of(JOB, recorder.events), 60, 20)
    text = "\n".join(line.plain for line in lines)
    assert "[bold]" in text
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_a_long_run_is_a_bounded_curve() -> None:
    course = Course(JOB)
    recorder = Recorder(record_training()[:3])
    for event in recorder.events:
        course.add(event)
    for step in range(1, 12_001):
        course.add(recorder.event(Progress(phase="training", step=step, loss=99.0 if step == 5_432 else 1.0)))
    curve = course.curves["loss"]
    assert len(curve) <= 2 * MAX_POINTS
    assert Point(5_432, 99.0, 1) in curve
    assert curve[-1].x == 12_000
    began = time.perf_counter()
    _frame(course, 200, 60)
    assert time.perf_counter() - began < 1


# --- a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """`knowledge-engine` on a pseudo-terminal of its own, which is its stderr and its stdin."""

    def __init__(self, server: str, *words: str, columns: int = 80, rows: int = 24, **environment: str) -> None:
        self._master, end_of_process = pty.openpty()
        self.text = ""
        self._searched = 0
        self.resize(columns, rows)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "knowledge_engine.cli", *words],
            env={key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "NO_COLOR")}
            | {"KNOWLEDGE_SERVER": server, "TERM": "xterm-256color"}
            | environment,
            stdin=end_of_process,
            stdout=subprocess.PIPE,
            stderr=end_of_process,
            text=True,
            start_new_session=True,
        )
        os.close(end_of_process)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(self, pattern: str, seconds: float = 60) -> str:
        """What came after the last pattern that was waited for, up to the end of this one."""
        deadline, begin = time.monotonic() + seconds, self._searched
        os.set_blocking(self._master, False)
        while (found := re.compile(pattern).search(self.text, begin)) is None:
            assert time.monotonic() < deadline, f"{pattern!r} was never shown: {self.text[-2000:]!r}"
            if not self._read():
                time.sleep(0.02)
        self._searched = found.end()
        return self.text[begin : found.end()]

    def finish(self, number: signal.Signals | None = None) -> tuple[int, str]:
        """The exit code and stdout, after a signal."""
        if number is not None:
            self.process.send_signal(number)
        os.set_blocking(self._master, False)
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text[-2000:]
            if not self._read():
                time.sleep(0.02)
        while self._read():
            pass
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            return self.process.returncode, stdout.read()

    def close(self) -> None:
        self.process.kill()
        self.process.wait(30)
        os.close(self._master)

    def left(self) -> str:
        """What stays on the first screen, without colours."""
        parts = self.text.split(OTHER_SCREEN)
        kept = parts[0] + "".join(part.partition(FIRST_SCREEN)[2] for part in parts[1:])
        return re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", kept).replace("\r\n", "\n")

    def _read(self) -> bool:
        try:
            chunk = os.read(self._master, 65536)
        except BlockingIOError:
            return False
        except OSError:  # Linux's way to say that nobody holds the other end any more
            return False
        self.text += chunk.decode(errors="replace")
        return bool(chunk)


@contextlib.contextmanager
def terminal(server: str, *words: str, **options: Any) -> Iterator[Terminal]:
    opened = Terminal(server, *words, **options)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture
async def replay() -> AsyncIterator[ScriptedServer]:
    """A server with a recorded training that goes on until it is told to end it, by an event in `script`."""
    recorder = Recorder(record_training())
    ending = asyncio.Event()

    async def watch(request: Any, context: Any) -> AsyncIterator[jobs_pb2.WatchJobResponse]:
        for event in recorder.events[request.after_sequence :]:
            yield jobs_pb2.WatchJobResponse(event=convert.job_event(event))
        await ending.wait()
        for event in recorder.finish():
            yield jobs_pb2.WatchJobResponse(event=convert.job_event(event))

    async def find(request: Any, context: Any) -> jobs_pb2.GetJobResponse:
        return jobs_pb2.GetJobResponse(job=convert.job(recorder.job))

    async with scripted_server() as server:
        server.script |= {"WatchJob": watch, "GetJob": find, "End": lambda *_: ending.set()}
        yield server


async def test_curves_follow_the_job_and_the_size_of_the_terminal_to_the_end(replay: ScriptedServer) -> None:
    def watch() -> None:
        with terminal(replay.address, "jobs", "watch", "job-7f3a") as shown:
            first = shown.read_until(r"training 229/300") + shown.read_until("step +1 +229")
            assert OTHER_SCREEN in first
            assert NO_CURSOR in first
            assert BRAILLE.search(first)
            assert not re.search(r"loss, nats.*learning rate", first)
            shown.resize(150, 40)
            shown.read_until(r"loss, nats[^\n]*learning rate")
            shown.resize(60, 20)
            shown.read_until(r"(?m)^[^\n]*loss, nats(?![^\n]*learning rate)[^\n]*\n")
            loop.call_soon_threadsafe(end_job, None, None)
            code, facts = shown.finish()
            left = shown.left()
        assert code == 0, left
        assert shown.text.rfind(FIRST_SCREEN) > shown.text.rfind(OTHER_SCREEN)
        assert shown.text.rfind(CURSOR) > shown.text.rfind(NO_CURSOR)
        assert left.count("loss, nats per token") == 1, "the last picture stays"
        assert "SUCCEEDED" in left
        assert max(map(len, left.splitlines())) <= 60
        assert "model version" in facts

    loop, end_job = asyncio.get_running_loop(), replay.script["End"]
    assert callable(end_job)
    await asyncio.to_thread(watch)


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
    ids=["ctrl-c", "terminated"],
)
async def test_an_interruption_gives_the_terminal_back(
    replay: ScriptedServer, number: signal.Signals, code: int
) -> None:
    def watch() -> None:
        with terminal(replay.address, "jobs", "watch", "job-7f3a") as shown:
            shown.read_until(r"training 229/300")
            assert shown.finish(number) == (code, "")
        assert shown.text.rfind(FIRST_SCREEN) > shown.text.rfind(OTHER_SCREEN)
        assert shown.text.rfind(CURSOR) > shown.text.rfind(NO_CURSOR)
        sentence = "job job-7f3a goes on; knowledge-engine jobs watch job-7f3a shows it again"
        assert shown.left().split("\n") == ([sentence, ""] if number is signal.SIGINT else [""])

    await asyncio.to_thread(watch)
    assert not [call for call in replay.received if call.method == "CancelJob"]


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (("--plain",), {}),
        pytest.param((), {"NO_COLOR": "1"}, marks=pytest.mark.slow),
        pytest.param((), {"TERM": "dumb"}, marks=pytest.mark.slow),
    ],
    ids=["plain", "no colour", "dumb"],
)
async def test_lines_where_lines_are_wanted(
    replay: ScriptedServer, words: tuple[str, ...], environment: dict[str, str]
) -> None:
    def watch() -> None:
        with terminal(replay.address, "jobs", "watch", "job-7f3a", *words, **environment) as shown:
            shown.read_until(r"CHECKPOINT_DAMAGED")
            assert shown.finish(signal.SIGINT)[0] == 130
        assert not re.search("[\x1b\u2800-\u28ff]", shown.text)
        assert "job-7f3a: checkpoint at step 40" in shown.text

    await asyncio.to_thread(watch)


@pytest.mark.slow
def test_a_real_training_is_watched_from_its_start_and_goes_on_when_nobody_looks(tmp_path: Path) -> None:
    service = start(tmp_path, build_tiny_base(tmp_path / "base"))
    rows = [
        {"messages": [{"role": "user", "content": f"a kettle {n}?"}, {"role": "assistant", "content": f"Kettle {n}."}]}
        for n in range(40)
    ]
    try:
        with Client(service.grpc_address) as client:
            client.upload_dataset("talks", "".join(json.dumps(row) + "\n" for row in rows).encode())
            spec = TrainingSpec(dataset="talks", model="m", max_steps=600, eval_steps=100, use_qlora=False)
            job = client.create_training_job(spec).id
            with terminal(service.grpc_address, "jobs", "watch", job) as first:
                first.read_until(r"training \d+/600", seconds=120)
                first.read_until(BRAILLE.pattern)
                assert first.finish(signal.SIGINT)[0] == 130
            assert not client.get_job(job).state.is_terminal
            with terminal(service.grpc_address, "jobs", "watch", job, columns=140, rows=40) as second:
                second.read_until(r"step +1 +\d+")
                code, _ = second.finish()
            assert code == 0
            assert client.get_job(job).state is JobState.SUCCEEDED
            report = collect(client, job)
            page = render(report, NOON)
        left = second.left()
        assert "held out" in left
        assert "at 600" in left
        assert len(BRAILLE.findall(left)) > 100
        assert report.version is not None
        assert report.source is not None
        assert report.version.dataset_digest == report.source.digest
        assert all(digest in page for digest in (report.version.digest, report.version.base_digest))
        assert "Base against tuned" in page
        assert page.count("held out") > 6
    finally:
        end(service)
