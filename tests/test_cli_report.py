"""The page about a job: every kind and state, exact figures, nothing from outside, nothing that a text could break."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterable
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from knowledge_engine.catalogue import DEMO_CATALOGUE
from knowledge_engine.cli import app
from knowledge_engine.cli.course import Course
from knowledge_engine.cli.curves import Point, short
from knowledge_engine.cli.figures import BOTTOM, LEFT, RIGHT, TOP, Mark, Series, figure
from knowledge_engine.cli.report import JobReport, collect, render
from knowledge_engine.client import Client
from knowledge_engine.core import (
    Dataset,
    DatasetKind,
    GenerationSpec,
    GenerationUsage,
    Job,
    JobState,
    JobWarning,
    LogLine,
    LoraConfig,
    ModelVersion,
    StateChange,
    TrackerRun,
    TrainingMethod,
    TrainingSpec,
)
from knowledge_engine.errors import KnowledgeEngineError, NotFoundError, Reason, Violation
from knowledge_engine.server.app import RunningServer
from tests.recorded import (
    GENERATED,
    GENERATION,
    JOB,
    NOON,
    STEPS,
    TRAINED,
    Recorder,
    record_generation,
    record_training,
)

EVIL = (
    """</td></style></svg></title><script>alert(1)</script><img src=x onerror=alert(2)>"' onload="x" {{ 7*7 }} &amp;"""
)
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart: its tags, its text, and whether its tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _dataset(name: str, kind: DatasetKind, digit: str, parents: Iterable[str] = (), job: str = "") -> Dataset:
    digest = "sha256:" + digit * 64
    return Dataset(
        name=name,
        kind=kind,
        digest=digest,
        num_rows=150,
        size_bytes=2048,
        create_time=NOON,
        parents=tuple(parents),
        job_id=job,
    )


CATALOGUE = _dataset("garden", DatasetKind.CATALOGUE, "9")
TALKS = _dataset("talks", DatasetKind.CONVERSATIONS, "1", [CATALOGUE.digest], GENERATION.id)
VERSION = ModelVersion(
    model="assistant",
    version=3,
    digest=TRAINED.digest,
    base_model="base",
    base_digest="sha256:" + "7" * 64,
    base_source="org/base",
    base_revision="c0ffee",
    dataset_digest=TALKS.digest,
    chat_template_digest="sha256:" + "5" * 64,
    job_id=JOB.id,
    spec=TrainingSpec(dataset="talks", model="assistant"),
    comparison=TRAINED.comparison,
    training_precision="nf4",
    size_bytes=9 * 2**20,
    create_time=NOON,
)


def _trained() -> JobReport:
    recorder = Recorder(record_training(until=STEPS))
    recorder.finish()
    job = recorder.job.model_copy(update={"tracker_run": TrackerRun(id="run-1")})
    return JobReport(job, Course.of(job, recorder.events), VERSION, TALKS, None, {CATALOGUE.digest: "garden"})


def _generated() -> JobReport:
    recorder = Recorder(record_generation())
    recorder.finish()
    return JobReport(recorder.job, Course.of(recorder.job, recorder.events), source=CATALOGUE, made=TALKS)


def _failed() -> JobReport:
    recorder = Recorder(record_training(until=200))
    error = KnowledgeEngineError(
        "the loss became nan at step 201",
        reason=Reason.NON_FINITE,
        violations=[Violation("spec.learning_rate", "a lower one usually helps")],
        step=201,
    ).to_dict()
    recorder.add(StateChange(state=JobState.FAILED, attempt=2, error=error))
    job = recorder.job.model_copy(update={"state": JobState.FAILED, "error": error})
    return JobReport(job, Course.of(job, recorder.events), source=TALKS)


def _in_state(state: JobState, job: Job) -> JobReport:
    """A job that went straight there and did nothing."""
    recorder = Recorder(job=job.model_copy(update={"state": state}))
    recorder.add(StateChange(state=JobState.QUEUED))
    if state is not JobState.QUEUED:
        recorder.add(StateChange(state=JobState.RUNNING, attempt=1))
        recorder.add(StateChange(state=state, attempt=1))
    return JobReport(recorder.job, Course.of(recorder.job, recorder.events))


def _page(report: JobReport) -> Page:
    return Page(render(report, NOON + timedelta(days=1)))


REPORTS = {"trained": _trained, "generated": _generated, "failed": _failed}


@pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS.keys())
def test_nothing_comes_from_outside_and_nothing_runs(make: object) -> None:
    assert callable(make)
    text = render(make(), NOON)
    page = Page(text)
    forbidden = {"script", "link", "img", "iframe", "object", "embed", "base", "form", "image", "use", "foreignobject"}
    assert not forbidden & {tag for tag, _ in page.tags}
    loading = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background", "style"}
    assert not [name for _, attributes in page.tags for name in attributes if name in loading or name.startswith("on")]
    assert not re.search(r"(?i)https?:|url\(|@import|@font-face|javascript:", text)
    (policy,) = [meta for meta in page.named("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_a_trained_job_tells_its_figures() -> None:
    text = render(_trained(), NOON)
    page = Page(text)
    figures = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text))
    assert figures["Held-out loss"] == "2.500 → 0.500"
    assert figures["Perplexity"] == f"{math.exp(2.5):.2f} → {math.exp(0.5):.2f}"
    assert (figures["Steps"], figures["Tokens"], figures["Peak memory"]) == ("300", "52,000", "4.0 GiB")
    for words in (
        "Training of assistant:3",
        "SUCCEEDED",
        "On 12 held-out conversations with 900 assistant tokens, both models in float32",
        "difference −2.0000 × 0.135",
        "1 1 to 169 2 min 56 s QUEUED: worker killed by signal 9",
        "2 161 to 300",
        "CHECKPOINT_DAMAGED",
        f"catalogue garden {CATALOGUE.digest}",
        f"conversations talks {TALKS.digest} 150 rows, 2.0 KiB, made by job job-900d",
        f"base model base {VERSION.base_digest} org/base, revision c0ffee",
        f"chat template {VERSION.chat_template_digest}",
        "job job-7f3a tracker run run-1",
        f"model version assistant:3 {TRAINED.digest} trained in nf4, 9.0 MiB",
        "135 conversations to train on, 15 held out",
        "checkpoint at step 280",
    ):
        assert words in page.text, words
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Speed", "Memory"]


def test_a_job_on_preferences_tells_no_perplexity() -> None:
    recorder = Recorder(record_training(until=STEPS))
    recorder.finish()
    spec = recorder.job.spec.model_copy(update={"method": TrainingMethod.DPO, "beta": 0.1})
    job = recorder.job.model_copy(update={"spec": spec})
    text = render(JobReport(job, Course.of(job, recorder.events), VERSION, TALKS), NOON)
    assert "erplexity" not in text
    for words in (
        "On 12 held-out preferences with 900 assistant tokens, both models in float32, the precision that serves. Loss "
        "in nats per preference.",
        "difference −2.0000",
        f"preferences talks {TALKS.digest}",
    ):
        assert words in Page(text).text, words
    assert "nats per token" not in text


def test_the_curves_hold_the_points_and_show_the_interruption() -> None:
    report = _trained()
    text = render(report, NOON)
    told = dict(re.findall(r"<title>step (\d+): (train [^<]*)</title>", text))
    for point in report.course.curves["loss"]:
        assert f"train {short(point.y)} (attempt {point.run})" in told[str(point.x)]
    assert "<title>step 85: train 5." in text, "the spike"
    both = re.search(r"<title>(step 165: train [^<]*)</title>", text)
    assert both is not None
    assert "(attempt 1)" in both[1]
    assert "(attempt 2)" in both[1]
    assert re.search(r"<title>step 300: train [\d.]+ \(attempt 2\), held out [\d.]+ \(attempt 2\)</title>", text)
    assert re.search(r"attempt 2 goes on here, 2030-01-01 12:02:59 UTC: worker killed by signal 9", text)
    assert text.count("<title>checkpoint at step") == 7
    (label,) = re.findall(r'aria-label="(Loss: [^"]*)"', text)
    assert "highest 5." in label
    assert "at 85" in label


def test_every_figure_and_table_has_a_name() -> None:
    for make in REPORTS.values():
        page = _page(make())
        assert len(page.named("caption")) >= len(page.named("table")) - 1  # the log has the name of its region
        assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in page.named("svg"))
        assert all(cell.get("scope") in ("col", "row") for cell in page.named("th"))
        assert page.named("html")[0]["lang"] == "en"
        assert [tag for tag, _ in page.tags if tag == "h1"] == ["h1"]


def test_what_is_not_the_default_is_marked() -> None:
    spec = TrainingSpec(
        dataset="talks", model="assistant", learning_rate=1e-3, lora=LoraConfig(rank=8, target_modules=("q", "v"))
    )
    report = JobReport(JOB.model_copy(update={"spec": spec}), Course(JOB))
    text = render(report, NOON)
    rows = re.findall(
        r'<tr( class="changed")?><th scope="row"><code>(.*?)</code></th><td>(.*?)</td>.*?>(.*?)</td>', text
    )
    settings = {name: (bool(changed), value, default) for changed, name, value, default in rows}
    assert set(settings) == {
        f"lora.{inner}" if name == "lora" else name
        for name in TrainingSpec.model_fields
        for inner in (LoraConfig.model_fields if name == "lora" else [""])
    }
    assert {name for name, (changed, _, _) in settings.items() if changed} == {
        "learning_rate",
        "lora.rank",
        "lora.target_modules",
    }
    assert settings["learning_rate"] == (True, "0.001", "0.0002")
    assert settings["lora.target_modules"] == (True, "q, v", "not set")
    assert settings["use_qlora"] == (False, "yes", "yes")
    assert settings["dataset"] == (False, "talks", "")


def test_a_generation_tells_its_counts_and_rejections() -> None:
    page = _page(_generated())
    for words in (
        "Conversations for talks",
        "Rejected 3 of 63",
        "DUPLICATE 2 WRONG_PRICE 1",
        "conversation 3: WRONG_PRICE",
        "conversations per second",
        f"catalogue garden {CATALOGUE.digest}",
        f"conversations talks {TALKS.digest}",
    ):
        assert words in page.text, words
    usage = GenerationUsage(prompt_tokens=1000, completion_tokens=50, num_requests=4, num_retries=1, cost_usd=0.25)
    report = _generated()
    result = GENERATED.model_copy(update={"usage": usage, "provider": "openai", "language_model": "gpt-x"})
    job = report.job.model_copy(update={"result": result})
    assert "Cost 0.2500 USD" in _page(JobReport(job, report.course)).text
    assert "openai gpt-x" in _page(JobReport(job, report.course)).text


def test_a_failed_job_tells_its_error_and_what_it_reached() -> None:
    page = _page(_failed())
    for words in (
        "NON_FINITE the loss became nan at step 201",
        "spec.learning_rate a lower one usually helps",
        "step: 201",
        "Step 200 of 300",
        "FAILED",
        "its digest is told by the version that is published",
    ):
        assert words in page.text, words
    assert len(page.named("svg")) == 5


@pytest.mark.parametrize("job", [JOB, GENERATION], ids=lambda job: job.kind.value)
@pytest.mark.parametrize("state", JobState)
def test_a_job_that_did_nothing_has_a_page(state: JobState, job: Job) -> None:
    page = _page(_in_state(state, job))
    assert state.value in page.text
    assert "Nothing was measured yet." in page.text
    assert not page.named("svg")


def test_what_was_deleted_since_is_said() -> None:
    report = _trained()
    text = _page(JobReport(report.job, report.course)).text
    assert "conversations talks deleted since" in text
    assert f"model version assistant:3 {TRAINED.digest} deleted since" in text
    source = JobReport(report.job, report.course, source=TALKS, parents={CATALOGUE.digest: ""})
    assert f"catalogue deleted since {CATALOGUE.digest}" in _page(source).text


def test_a_loss_beyond_reach_has_a_page() -> None:
    report = _trained()
    assert TRAINED.comparison is not None
    comparison = TRAINED.comparison.model_copy(update={"base_loss": 5.0, "tuned_loss": 1e6})
    job = report.job.model_copy(update={"result": TRAINED.model_copy(update={"comparison": comparison})})
    assert "beyond 1e308" in _page(JobReport(job, report.course)).text


def test_no_text_of_others_becomes_markup() -> None:
    recorder = Recorder(record_training(until=200))
    recorder.add(LogLine(message=EVIL))
    recorder.add(JobWarning(reason=EVIL, message=EVIL))
    recorder.add(StateChange(state=JobState.QUEUED, attempt=2, message=EVIL))
    recorder.add(StateChange(state=JobState.RUNNING, attempt=3))
    spec = JOB.spec.model_copy(update={"lora": LoraConfig(target_modules=(EVIL[:128],))})
    error = KnowledgeEngineError(EVIL, violations=[Violation(EVIL, EVIL)], **{"a<b>": EVIL}).to_dict()
    job = recorder.job.model_copy(
        update={"creator": EVIL, "spec": spec, "error": error, "tracker_run": TrackerRun(id=EVIL, url=EVIL)}
    )
    version = VERSION.model_copy(update={"base_source": EVIL, "base_revision": EVIL, "digest": EVIL})
    plain = JobReport(recorder.job, Course.of(recorder.job, recorder.events[:200]))
    report = JobReport(job, Course.of(job, recorder.events), version, TALKS, None, {EVIL: EVIL})
    text = render(report, NOON)
    page = Page(text)
    assert {tag for tag, _ in page.tags} <= {tag for tag, _ in _page(plain).tags} | {"ul", "li", "section", "p", "b"}
    assert "alert(1)" in page.text
    assert "{{ 7*7 }}" in page.text
    assert "<script" not in text
    assert "<img" not in text
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_a_long_log_is_cut_and_says_so() -> None:
    recorder = Recorder(record_training()[:3])
    for number in range(2_500):
        recorder.add(LogLine(message=f"line {number} of many"))
    page = _page(JobReport(recorder.job, Course.of(recorder.job, recorder.events)))
    assert "502 earlier lines are left out" in page.text
    assert "line 2499 of many" in page.text
    assert "line 100 of many" not in page.text


def test_a_figure_s_places() -> None:
    points = [Point(0, 1.0), Point(5, math.nan), Point(10, 3.0), Point(10, 2.0, 2)]
    drawn = figure("t", "u", [Series("s", points)], marks=[Mark(5, "m", ""), Mark(11, "outside", "")])
    assert drawn is not None
    assert (
        drawn.lines[0].path == f"M{LEFT:.1f} {BOTTOM:.1f}h0M{RIGHT:.1f} {TOP:.1f}h0M{RIGHT:.1f} {(TOP + BOTTOM) / 2}h0"
    )
    assert [(mark.x, mark.label) for mark in drawn.marks] == [((LEFT + RIGHT) / 2, "m")]
    assert [stop.text for stop in drawn.stops] == [
        "step 0: s 1 (attempt 1)",
        "step 10: s 3 (attempt 1), s 2 (attempt 2)",
    ]
    assert (drawn.stops[0].left, drawn.stops[-1].left + drawn.stops[-1].width) == (LEFT, RIGHT)
    assert drawn.summary == "s from 1 at step 0 to 2 at step 10, lowest 1 at 0, highest 3 at 10"
    assert figure("t", "u", [Series("s", [Point(0, math.nan)])]) is None


async def test_the_page_of_a_real_job_comes_over_grpc_alone(server: RunningServer, tmp_path: Path) -> None:
    out = tmp_path / "page.html"

    def make() -> JobReport:
        with Client(server.address) as client:
            client.upload_dataset("shop", DEMO_CATALOGUE.read_bytes(), kind=DatasetKind.CATALOGUE)
            job = client.create_generation_job(GenerationSpec(catalogue="shop", dataset="talks", num_conversations=12))
            for _ in client.watch_job(job.id):
                pass
            words = ["jobs", "report", job.id, "--server", server.address, "--out"]
            assert CliRunner().invoke(app, [*words, str(out)]).stdout == f"{out}\n"
            told = CliRunner().invoke(app, [*words, str(out), "--json"]).stdout
            assert json.loads(told) == {"report": str(out)}
            refused = CliRunner().invoke(app, [*words, str(tmp_path / "no" / "x.html")])
            assert refused.exit_code == 2
            assert "No such file or directory" in " ".join(refused.stderr.replace("│", " ").split())
            with pytest.raises(NotFoundError):
                collect(client, "nothing")
            return collect(client, job.id)

    report = await asyncio.to_thread(make)
    page = Page(out.read_text())
    assert report.source is not None
    assert report.made is not None
    assert report.source.digest in page.text
    assert report.made.digest in page.text
    assert "generating 12 conversations from shop" in page.text
    assert page.named("svg")
