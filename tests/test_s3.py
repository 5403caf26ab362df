"""Two machines over one bucket: publishing, reading, deleting, healing, and what the bucket's bad days do to each."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from knowledge_engine.client import Client
from knowledge_engine.core import (
    Job,
    JobKind,
    JobState,
    JobStopped,
    JobWarning,
    LogLine,
    Page,
    Progress,
    Service,
    StateChange,
    StopReason,
    TrainingSpec,
    utc_now,
)
from knowledge_engine.errors import (
    CredentialsError,
    IntegrityError,
    InvalidSpecError,
    NotFoundError,
    Reason,
    UpstreamError,
)
from knowledge_engine.registry import Registry
from knowledge_engine.remote import Remote
from knowledge_engine.server.app import RunningServer, start_server
from knowledge_engine.server.services import InferenceServicer, _in
from knowledge_engine.settings import Settings
from knowledge_engine.storage import PART_BYTES, Bucket, Stored
from knowledge_engine.training.publishing import (
    Trained,
    drop_kept,
    find_kept,
    fingerprint,
    keep,
    publish_patiently,
    sweep_kept,
    training_facts,
)
from knowledge_engine.v1 import jobs_pb2, jobs_pb2_grpc, models_pb2, models_pb2_grpc
from tests.faulty_proxy import Fault, FaultyProxy
from tests.running import end, is_serving, start, wait_until
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed
from tests.test_registry import publish, weights_of

WEIGHTS = "adapter_model.safetensors"
FOLDER = "models/shop/1/"


class Machines:
    """Registries with folders of their own over one bucket."""

    def __init__(self, root: Path, make_bucket: Callable[..., Bucket], proxy: FaultyProxy) -> None:
        self._root = root
        self._make_bucket = make_bucket
        self._proxy = proxy

    def __call__(self, name: str, *, proxied: bool = False) -> Registry:
        # What passes the proxy waits for answers that never come; a busy machine needs a while for those that do.
        changes = {"s3_endpoint_url": self._proxy.url, "read_seconds": 3} if proxied else {}
        return Registry(self._root / name, Remote(self._make_bucket(**changes)))


@pytest.fixture
def machines(tmp_path: Path, make_bucket: Callable[..., Bucket], proxy: FaultyProxy) -> Machines:
    return Machines(tmp_path, make_bucket, proxy)


@pytest.fixture
def bucket(make_bucket: Callable[..., Bucket]) -> Bucket:
    return make_bucket()


def names(registry: Registry) -> list[str]:
    return [model.name for model in registry.list_models(Page(100, None))[0]]


def files_of(registry: Registry, version: int = 1) -> set[str]:
    return {path.name for path in registry.folder("shop", version).iterdir()}


# --- two machines -------------------------------------------------------------------------------------------------


def test_what_one_machine_publishes_the_other_serves(machines: Machines, seaweed: Seaweed, bucket: Bucket) -> None:
    a, b = machines("a"), machines("b")
    published = publish(a, "job-1")
    # The local layout, so that other tools can read it.
    files = ["adapter_config.json", WEIGHTS, "claim.json", "manifest.json"]
    assert seaweed.keys(bucket.name) == [FOLDER + name for name in files]
    assert names(b) == []
    assert b.resolve("shop", None) == published  # not known here, so it is asked for
    assert b.get("shop", 1) == published
    assert files_of(b) == {"manifest.json"}  # facts need no weights
    b.verify("shop", 1)
    assert files_of(b) == {"manifest.json", WEIGHTS, "adapter_config.json"}
    assert weights_of(b.folder("shop", 1) / WEIGHTS) == b"weights"
    assert {path.stat().st_mode & 0o777 for path in b.folder("shop", 1).iterdir()} == {0o600}
    second = publish(b, "job-2", weights=b"other")
    assert second.version == 2
    assert a.resolve("shop", None) == published
    a.sync()
    assert a.resolve("shop", None) == second
    assert a.get_model("shop").num_versions == 2


def test_what_is_not_there_is_not_found(machines: Machines) -> None:
    a, b = machines("a"), machines("b")
    publish(a, "job-1")
    for call, reason in (
        (lambda: b.resolve("other", None), Reason.MODEL_NOT_FOUND),
        (lambda: b.get("shop", 7), Reason.MODEL_NOT_FOUND),
        (lambda: (b.sync(), b.get("shop", 7)), Reason.MODEL_VERSION_NOT_FOUND),
    ):
        with pytest.raises(NotFoundError) as caught:
            call()
        assert caught.value.reason is reason


def test_a_deleted_version_goes_everywhere_and_its_number_with_it(
    machines: Machines, seaweed: Seaweed, bucket: Bucket
) -> None:
    a, b = machines("a"), machines("b")
    publish(a, "job-1")
    b.sync()
    b.verify("shop", 1)
    a.delete("shop", 1)
    assert seaweed.keys(bucket.name) == [FOLDER + "deleted.json"]
    b.sync()
    for registry in (a, b, machines("c")):
        with pytest.raises(NotFoundError):
            registry.get("shop", 1)
        with pytest.raises(NotFoundError):
            registry.delete("shop", 1)
        assert names(registry) == []
    assert not b.folder("shop", 1).exists()
    assert publish(machines("c"), "job-2").version == 2


def test_a_deletion_that_was_killed_is_finished(machines: Machines, bucket: Bucket, seaweed: Seaweed) -> None:
    a, b = machines("a"), machines("b")
    publish(a, "job-1")
    bucket.put(FOLDER + "deleted.json", b"{}")  # this far it came
    a.sync()
    assert names(a) == []
    with pytest.raises(NotFoundError):
        b.resolve("shop", None)
    Remote(bucket).sweep(utc_now() - timedelta(hours=1))
    assert seaweed.keys(bucket.name) == [FOLDER + "deleted.json"]


def test_an_emptied_bucket_costs_no_copy_and_gives_no_number_twice(machines: Machines, bucket: Bucket) -> None:
    a = machines("a")
    published = publish(a, "job-1")
    bucket.delete([stored.key for stored in bucket.list_objects("models/")])
    a.sync()
    assert a.resolve("shop", None) == published
    a.verify("shop", 1)
    assert publish(a, "job-2").version == 2


def test_concurrent_publishers_get_different_numbers_and_overwrite_nothing(
    machines: Machines, seaweed: Seaweed, bucket: Bucket
) -> None:
    registries = [machines(name) for name in "abab"]

    def work(index: int) -> tuple[int, str]:
        version = publish(registries[index % 4], f"job-{index}", weights=str(index).encode() * 100)
        return version.version, version.job_id

    with ThreadPoolExecutor(8) as pool:
        taken = dict(pool.map(work, range(8)))
    assert sorted(taken) == list(range(1, 9))
    reader = machines("reader")
    reader.sync()
    for version, job_id in taken.items():
        assert reader.get("shop", version).job_id == job_id
        reader.verify("shop", version)
        assert weights_of(reader.folder("shop", version) / WEIGHTS) == job_id.removeprefix("job-").encode() * 100
        claim = json.loads(seaweed.read(bucket.name, f"models/shop/{version}/claim.json"))
        assert claim["job_id"] == job_id


def test_a_job_publishes_once_wherever_it_runs_again(machines: Machines) -> None:
    a = machines("a")
    assert publish(a, "job-1") == publish(a, "job-1") == publish(machines("b"), "job-1", weights=b"trained again")
    assert a.get_model("shop").num_versions == 1


class Meanwhile(Bucket):
    """Something happens right after it was listed, and what was listed is no longer true."""

    then: Callable[[], object] = staticmethod(lambda: None)

    def list_objects(self, prefix: str) -> list[Stored]:
        found = super().list_objects(prefix)
        then, self.then = self.then, lambda: None
        then()
        return found


class Careless(Bucket):
    """An S3 server that does not know `If-None-Match`."""

    def put(self, key: str, body: bytes, *, only_new: bool = False) -> bool:
        return super().put(key, body)


def test_a_published_version_is_never_overwritten(
    machines: Machines, bucket: Bucket, tmp_path: Path, seaweed: Seaweed
) -> None:
    stale = Meanwhile(bucket._settings)
    stale.then = lambda: publish(machines("a"), "job-1")
    published = Remote(stale).publish("shop", "job-2", tmp_path, {}, lambda version: b"second", lambda: None)
    assert published == (2, b"second")
    reader = machines("b")
    assert reader.get("shop", 1).job_id == "job-1"
    reader.verify("shop", 1)


def test_a_server_without_conditional_writes_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(InvalidSpecError, match="If-None-Match"):
        Remote(Careless(bucket._settings)).publish("shop", "job-1", tmp_path, {}, lambda version: b"x", lambda: None)


def test_a_publisher_that_comes_back_under_the_sweep_keeps_its_version(bucket: Bucket, tmp_path: Path) -> None:
    bucket.put(FOLDER + "claim.json", b'{"job_id": "job-1"}')
    late = Meanwhile(bucket._settings)
    published: list[tuple[int, bytes]] = []

    def come_back() -> None:
        publisher = Remote(bucket)
        published.append(publisher.publish("shop", "job-1", tmp_path, {}, lambda version: b"ours", lambda: None))

    late.then = come_back
    Remote(late).sweep(utc_now() + timedelta(hours=1))
    assert published == [(1, b"ours")]
    assert Remote(bucket).read_manifest("shop", 1) == b"ours"


def test_a_manifest_that_is_there_first_counts(bucket: Bucket, tmp_path: Path) -> None:
    def manifest_of(version: int) -> bytes:
        bucket.put(FOLDER + "manifest.json", b"of an attempt that was thought dead")
        return b"ours"

    published = Remote(bucket).publish("shop", "job-1", tmp_path, {}, manifest_of, lambda: None)
    assert published == (1, b"of an attempt that was thought dead")


def test_a_number_that_was_swept_meanwhile_is_left(bucket: Bucket, tmp_path: Path, seaweed: Seaweed) -> None:
    def manifest_of(version: int) -> bytes:
        if version == 1:
            Remote(bucket).sweep(utc_now() + timedelta(hours=1))
        return b"ours"

    assert Remote(bucket).publish("shop", "job-1", tmp_path, {}, manifest_of, lambda: None) == (2, b"ours")
    assert [key for key in seaweed.keys(bucket.name) if key.startswith(FOLDER)] == [FOLDER + "deleted.json"]


# --- files on their way -------------------------------------------------------------------------------------------


def test_many_readers_fetch_a_file_once(machines: Machines, proxy: FaultyProxy) -> None:
    publish(machines("a"), "job-1", weights=b"x" * 1_000_000)
    readers = [machines("b", proxied=True) for _ in range(4)]
    readers[0].sync()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda reader: reader.verify("shop", 1), readers))
    assert proxy.count("GET", WEIGHTS) == 1


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"weightz", "not what was published"),
        (b"wei", "not what"),
        (b"weights and more", "not what"),
        (None, "missing"),
    ],
    ids=["flipped", "short", "long", "missing"],
)
def test_a_file_damaged_in_the_bucket_is_refused_by_name(
    machines: Machines, bucket: Bucket, body: bytes | None, what: str
) -> None:
    a, b = machines("a"), machines("b")
    publish(a, "job-1")
    publish(a, "job-2")
    if body is None:
        bucket.delete([FOLDER + WEIGHTS])
    else:
        bucket.put(FOLDER + WEIGHTS, body)
    b.sync()
    with pytest.raises(IntegrityError, match=what) as caught:
        b.verify("shop", 1)
    assert (caught.value.reason, caught.value.metadata["file"]) == (Reason.MODEL_VERSION_CORRUPT, WEIGHTS)
    assert WEIGHTS not in files_of(b)
    b.verify("shop", 2)
    a.verify("shop", 1)  # who has it whole serves on


@pytest.mark.parametrize("kind", ["truncate", "reset"])
def test_a_file_survives_a_bad_way(machines: Machines, proxy: FaultyProxy, kind: str) -> None:
    publish(machines("a"), "job-1")
    b = machines("b", proxied=True)
    b.sync()
    proxy.faults = [Fault(kind, "GET", WEIGHTS, times=2)]
    b.verify("shop", 1)
    assert weights_of(b.folder("shop", 1) / WEIGHTS) == b"weights"


def test_a_damaged_copy_is_healed_and_that_is_said(
    machines: Machines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publish(machines("a"), "job-1")
    b = machines("b")
    b.sync()
    b.verify("shop", 1)
    (b.folder("shop", 1) / WEIGHTS).write_bytes(b"weightz")
    b.verify("shop", 1)
    assert weights_of(b.folder("shop", 1) / WEIGHTS) == b"weights"
    assert f"{WEIGHTS} of version 1 of model 'shop' has changed" in caplog.text
    (b.folder("shop", 1) / "manifest.json").write_bytes(b"{")
    assert machines("b").get("shop", 1) == b.get("shop", 1)
    (b.folder("shop", 1) / "extra.py").write_text("print()")
    with pytest.raises(IntegrityError, match=r"extra\.py"):
        b.verify("shop", 1)


@pytest.mark.parametrize("name", ["../../../escaped", "/etc/escaped", ".hidden", "a/b", "manifest.json"])
def test_a_manifest_cannot_name_files_elsewhere(
    machines: Machines, bucket: Bucket, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    a, b = machines("a"), machines("b")
    publish(a, "job-1")
    publish(a, "job-2", model="good")
    manifest = json.loads(bucket.get(FOLDER + "manifest.json") or b"")
    manifest["files"][name] = {"sha256": "0" * 64, "size_bytes": 1}
    bucket.put(FOLDER + "manifest.json", json.dumps(manifest).encode())
    b.sync()
    assert names(b) == ["good"]
    assert "manifest.json cannot be read" in caplog.text
    with pytest.raises(IntegrityError):
        b.get("shop", 1)


# --- the bucket is away -------------------------------------------------------------------------------------------


def test_what_is_here_goes_on_being_served_while_the_bucket_is_away(machines: Machines, proxy: FaultyProxy) -> None:
    publish(machines("a"), "job-1")
    b = machines("b", proxied=True)
    b.sync()
    b.verify("shop", 1)
    proxy.faults = [Fault("cut")]
    assert b.resolve("shop", None).version == 1
    b.verify("shop", 1)
    assert names(b) == ["shop"]
    for call in (lambda: b.resolve("other", None), lambda: b.get("shop", 2), lambda: b.delete("shop", 1)):
        with pytest.raises(UpstreamError) as caught:
            call()
        assert caught.value.reason is Reason.STORAGE_UNREACHABLE
    assert b.get("shop", 1).version == 1


def test_a_bucket_that_just_failed_is_not_asked_for_every_caller(machines: Machines, proxy: FaultyProxy) -> None:
    b = machines("b", proxied=True)
    proxy.faults = [Fault("cut")]
    for _ in range(10):
        with pytest.raises(UpstreamError):
            b.resolve("other", None)
    assert len(proxy.requests) == 3  # the tries of the first one


def test_following_tells_trouble_and_its_end_once(machines: Machines, proxy: FaultyProxy) -> None:
    b = machines("b", proxied=True)
    told: list[str | None] = []
    stop = threading.Event()
    thread = threading.Thread(target=b.follow, args=(told.append, stop), kwargs={"sync_seconds": 0.05})
    thread.start()
    try:
        wait_until(lambda: told == [None])
        publish(machines("a"), "job-1")
        wait_until(lambda: names(b) == ["shop"])
        proxy.faults = [Fault("expired")]
        wait_until(lambda: len(told) == 2)
        asked = len(proxy.requests)
        wait_until(lambda: len(proxy.requests) > asked + 5)
        proxy.faults = []
        wait_until(lambda: len(told) == 3)
    finally:
        stop.set()
        thread.join()
    assert told[2] is None
    assert told[1] is not None
    assert "ExpiredToken" in told[1]


def test_leftovers_are_swept_by_age_and_published_versions_stay(
    machines: Machines, bucket: Bucket, seaweed: Seaweed, caplog: pytest.LogCaptureFixture
) -> None:
    publish(machines("a"), "job-1")
    kept = seaweed.keys(bucket.name)
    bucket.put("models/shop/2/claim.json", b'{"job_id": "dead"}')
    bucket.put(f"models/shop/2/{WEIGHTS}", b"half")
    others = ["elsewhere", "models/resnet/1/model.onnx"]
    for key in others:
        bucket.put(key, b"not ours")
    for key in (f"models/shop/2/{WEIGHTS}.part", "models/resnet/2/model.onnx"):
        seaweed.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    remote = Remote(bucket)
    remote.sweep(utc_now() - timedelta(hours=24))
    assert len(seaweed.keys(bucket.name)) == len(kept) + 4
    remote.sweep(utc_now() + timedelta(hours=1))
    assert seaweed.keys(bucket.name) == sorted([*kept, *others, "models/shop/2/deleted.json"])
    uploads = seaweed.client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
    assert [upload["Key"] for upload in uploads] == ["models/resnet/2/model.onnx"]
    assert "version 2 of model 'shop' were taken away" in caplog.text
    assert publish(machines("b"), "job-2").version == 3


# --- publishing on a bad day --------------------------------------------------------------------------------------


class FakeContext:
    """Records what a job says; `stop` ends it with that reason."""

    def __init__(self, work_dir: Path) -> None:
        spec = TrainingSpec(dataset="d", model="shop")
        self.job = Job(id="job-1", kind=JobKind.TRAINING, state=JobState.RUNNING, spec=spec, create_time=utc_now())
        self.work_dir = work_dir
        self.warnings: list[tuple[str, str]] = []
        self.observed: list[str | None] = []
        self.stop: StopReason | None = None

    def report(self, progress: Progress) -> None: ...

    def log(self, message: str) -> None: ...

    def expect_memory(self, memory_bytes: int) -> None: ...

    def track(self, run: Any) -> None: ...

    def checkpointed(self, step: int, size_bytes: int) -> None: ...

    def at_end(self, call: Any) -> None: ...

    def warn(self, reason: str, message: str) -> None:
        self.warnings.append((reason, message))

    def observe(self, service: Service, trouble: str | None) -> None:
        assert service is Service.S3
        self.observed.append(trouble)

    def check(self) -> None:
        if self.stop:
            raise JobStopped(self.stop)


class Publisher:
    """A job's last act, on a machine whose way to the bucket leads through the proxy."""

    def __init__(self, registry: Registry, make_settings: Callable[..., Settings], tmp_path: Path) -> None:
        self.registry = registry
        self._make_settings = make_settings
        self.context = FakeContext(tmp_path)

    def run(self, patience: float = 60, weights: bytes = b"weights") -> int:
        settings = self._make_settings(s3_patience_seconds=patience)

        def once() -> Any:
            return publish(self.registry, "job-1", weights=weights, check=self.context.check)

        return publish_patiently(self.context, settings, self.registry, "shop", once).version


@pytest.fixture
def publisher(machines: Machines, make_settings: Callable[..., Settings], tmp_path: Path) -> Publisher:
    return Publisher(machines("a", proxied=True), make_settings, tmp_path)


@pytest.mark.parametrize(
    ("kind", "method", "part"),
    [
        ("500", "", ""),
        ("reset", "PUT", WEIGHTS),
        ("lost", "PUT", "manifest.json"),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (
                ("slow down", "PUT", WEIGHTS),
                ("stall", "PUT", "claim.json"),
                ("lost", "PUT", "claim.json"),
                ("truncate", "GET", ""),
            )
        ),
    ],
)
def test_publishing_waits_for_the_bucket(
    publisher: Publisher, machines: Machines, proxy: FaultyProxy, kind: str, method: str, part: str
) -> None:
    proxy.faults = [Fault(kind, method, part, times=4)]  # more than one request survives by itself
    assert publisher.run() == 1
    context = publisher.context
    if kind != "lost":  # that one is found to have been done
        assert [reason for reason, _ in context.warnings] == ["STORAGE_UNREACHABLE"]
        assert len(context.observed) >= 2
    assert context.observed[-1] is None
    reader = machines("b")
    reader.sync()
    assert reader.get_model("shop").num_versions == 1
    reader.verify("shop", 1)


def test_a_part_that_is_reset_costs_only_itself(publisher: Publisher, machines: Machines, proxy: FaultyProxy) -> None:
    proxy.faults = [Fault("reset", "PUT", "partNumber=2", times=1)]
    assert publisher.run(weights=b"x" * (PART_BYTES + 1)) == 1
    assert proxy.count("PUT", "partNumber") == 3
    reader = machines("b")
    reader.sync()
    reader.verify("shop", 1)


def test_patience_ends_with_one_clear_failure_and_the_next_try_goes_on(
    publisher: Publisher, machines: Machines, proxy: FaultyProxy
) -> None:
    proxy.faults = [Fault("slow down", "PUT", "manifest.json")]
    with pytest.raises(UpstreamError, match=r"503 SlowDown.*kept") as caught:
        publisher.run(patience=2)
    assert caught.value.reason is Reason.STORAGE_UNREACHABLE
    assert len(publisher.context.warnings) <= 1  # none where one try took all the patience
    assert publisher.context.observed[-1] is not None
    reader = machines("b")
    reader.sync()
    assert names(reader) == []
    proxy.faults, proxy.requests = [], []
    assert publisher.run() == 1
    assert proxy.count("PUT", WEIGHTS) == 0  # it was there already


def test_expired_credentials_fail_at_once(publisher: Publisher, proxy: FaultyProxy) -> None:
    proxy.faults = [Fault("expired", after=3)]
    with pytest.raises(CredentialsError, match=r"ExpiredToken.*kept") as caught:
        publisher.run()
    assert caught.value.reason is Reason.UPSTREAM_CREDENTIALS
    assert len(proxy.requests) == 4
    assert publisher.context.warnings == []
    assert publisher.context.observed == [caught.value.message.split(";")[0]]


def test_a_missing_bucket_is_named_by_the_job(
    make_bucket: Callable[..., Bucket], make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "a", Remote(make_bucket(s3_bucket="not-there")))
    with pytest.raises(UpstreamError, match=r"'not-there'.*does not exist"):
        Publisher(registry, make_settings, tmp_path).run(patience=0)


@pytest.mark.parametrize("reason", [StopReason.CANCELLED, StopReason.INTERRUPTED])
def test_a_cancelled_job_leaves_nothing_in_the_bucket_an_interrupted_one_its_claim(
    publisher: Publisher, proxy: FaultyProxy, seaweed: Seaweed, bucket: Bucket, reason: StopReason
) -> None:
    proxy.faults = [Fault("slow down", "PUT", "manifest.json")]

    def stop() -> None:
        wait_until(lambda: publisher.context.warnings)
        publisher.context.stop = reason

    thread = threading.Thread(target=stop)
    thread.start()
    asked = time.monotonic()
    with pytest.raises(JobStopped):
        publisher.run(patience=600)
    thread.join()
    assert time.monotonic() - asked < 60
    assert bool(seaweed.keys(bucket.name)) is (reason is StopReason.INTERRUPTED)


def test_cancelling_while_a_big_file_travels_leaves_nothing(
    publisher: Publisher, proxy: FaultyProxy, seaweed: Seaweed, bucket: Bucket
) -> None:
    def stop() -> None:
        wait_until(lambda: proxy.count("PUT", "partNumber=2"))
        publisher.context.stop = StopReason.CANCELLED

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(JobStopped):
        publisher.run(weights=b"x" * (6 * PART_BYTES))
    thread.join()
    assert seaweed.keys(bucket.name) == []
    assert "Uploads" not in seaweed.client.list_multipart_uploads(Bucket=bucket.name)


_CHILD = """
import sys
from pathlib import Path
from knowledge_engine.registry import Registry
from knowledge_engine.remote import Remote
from knowledge_engine.settings import load_settings
from knowledge_engine.storage import Bucket
from tests.test_registry import publish, weights_of
publish(Registry(Path(sys.argv[1]), Remote(Bucket(load_settings(None)))), "job-2", weights=b"new")
"""


@pytest.mark.parametrize(
    ("kind", "part"),
    [
        pytest.param("hang", "2/claim.json", marks=pytest.mark.slow, id="claimed"),
        pytest.param("stall", f"2/{WEIGHTS}", id="uploading"),
        pytest.param("stall", "2/manifest.json", marks=pytest.mark.slow, id="before the manifest"),
        pytest.param("hang", "2/manifest.json", id="after the manifest"),
    ],
)
def test_a_killed_publisher_shows_old_or_new_and_goes_on_with_its_number(
    machines: Machines,
    s3_settings: Callable[..., Settings],
    proxy: FaultyProxy,
    tmp_path: Path,
    kind: str,
    part: str,
) -> None:
    publish(machines("b"), "job-1", weights=b"old")
    proxy.faults = [Fault(kind, "PUT", part, times=1)]
    settings = s3_settings(s3_endpoint_url=proxy.url)
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path / "a")],
        env=settings.child_environment(),
        cwd=Path(__file__).parents[1],
    )
    try:
        wait_until(lambda: proxy.count("PUT", part))
        time.sleep(0.2)  # what hangs has been done by now
    finally:
        child.kill()
        child.wait()
    reader = machines("reader")
    reader.sync()
    seen = reader.resolve("shop", None)
    assert seen.version == (2 if part == "2/manifest.json" and kind == "hang" else 1)
    reader.verify("shop", seen.version)
    again = publish(machines("a"), "job-2", weights=b"new")
    assert again.version == 2
    assert (seen.version, seen.digest) in {(1, reader.get("shop", 1).digest), (2, again.digest)}
    reader.sync()
    reader.verify("shop", 2)
    assert weights_of(reader.folder("shop", 2) / WEIGHTS) == b"new"
    assert reader.get_model("shop").num_versions == 2


# --- what was trained is kept -------------------------------------------------------------------------------------


def _trained(folder: Path, job_id: str = "job-1") -> tuple[Path, Trained]:
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(b"weights")
    facts = {"loss": 0.5, "num_steps": 3, "num_tokens": 9, "seconds": 2.0, "peak_memory_bytes": 7, "comparison": None}
    return folder, Trained(job_id=job_id, **facts)


def _mark(spec: TrainingSpec, *digests: str, **parents: str) -> str:
    return fingerprint(training_facts(spec, *digests, parents))


def test_a_kept_adapter_is_found_by_its_job_and_by_an_equal_one(
    make_settings: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make_settings()
    mark = _mark(TrainingSpec(dataset="d", model="m"), "data", "base", "template", "nf4")
    assert find_kept(settings, mark, "job-1") is None
    kept = keep(settings, mark, *_trained(tmp_path / "staged"))
    assert find_kept(settings, mark, "job-2") is None  # its job is at work with it
    kept.release()
    assert find_kept(settings, "another", "job-2") is None
    for job_id in ("job-1", "job-2"):
        found = find_kept(settings, mark, job_id)
        assert found is not None
        assert found.trained.job_id == "job-1"
        assert (found.folder / WEIGHTS).read_bytes() == b"weights"
        found.release()
    drop_kept(settings, "job-1")
    assert find_kept(settings, mark, "job-1") is not None  # it is job-2's now, and becomes job-1's
    drop_kept(settings, "job-1")
    assert not list((settings.data_dir / "unpublished").iterdir())


def test_a_damaged_kept_adapter_is_not_used(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    settings = make_settings()
    kept = keep(settings, "mark", *_trained(tmp_path / "staged"))
    kept.release()
    (kept.folder / WEIGHTS).write_bytes(b"weightz")
    assert find_kept(settings, "mark", "job-1") is None
    keep(settings, "mark", *_trained(tmp_path / "again")).release()
    assert find_kept(settings, "mark", "job-1") is not None


def test_what_nobody_came_back_for_is_swept(make_settings: Callable[..., Settings], tmp_path: Path) -> None:
    settings = make_settings()
    kept = keep(settings, "mark", *_trained(tmp_path / "staged"))
    sweep_kept(settings, timedelta(0))  # its job is at work with it
    kept.release()
    sweep_kept(settings)
    assert kept.folder.exists()
    sweep_kept(settings, timedelta(0))
    assert not list((settings.data_dir / "unpublished").iterdir())


@pytest.mark.parametrize(
    "changes", [{"seed": 7}, {"model": "other"}, {"learning_rate": 0.5}], ids=["seed", "model", "learning rate"]
)
def test_another_training_has_another_fingerprint(changes: dict[str, Any]) -> None:
    spec = TrainingSpec(dataset="d", model="m")
    changed = TrainingSpec.model_validate(spec.model_dump() | changes)
    assert _mark(spec, "a", "b", "c", "nf4") == _mark(spec, "a", "b", "c", "nf4")
    marks = {_mark(spec, *digests) for digests in (("a", "b", "c", "nf4"), ("x", "b", "c", "nf4"))}
    marks |= {_mark(changed, "a", "b", "c", "nf4"), _mark(spec, "a", "x", "c", "nf4")}
    marks |= {_mark(spec, "a", "b", "c", "nf4", start_from_digest="d")}
    assert len(marks) == 5


# --- servers ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[tuple[RunningServer, models_pb2_grpc.ModelServiceStub]]:
    async with (
        await start_server(settings) as server,
        grpc.aio.insecure_channel(server.address) as channel,
    ):
        yield server, models_pb2_grpc.ModelServiceStub(channel)


async def test_a_server_tells_what_another_machine_published_and_deletes_it_there(
    s3_settings: Callable[..., Settings], machines: Machines, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = publish(machines("a"), "job-1")
    publish(Registry(tmp_path / "server" / "models"), "job-0", model="local")
    async with serving(s3_settings(data_dir=tmp_path / "server")) as (_, models):
        name = "models/shop/versions/1"
        version = (await models.GetModelVersion(models_pb2.GetModelVersionRequest(name=name))).model_version
        assert version.digest == published.digest
        assert [model.name for model in (await models.ListModels(models_pb2.ListModelsRequest())).models] == [
            "models/shop"
        ]
        assert "holds versions from before a bucket was set" in caplog.text
        await models.DeleteModelVersion(models_pb2.DeleteModelVersionRequest(name=name))
    a = machines("a")
    a.sync()
    assert names(a) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"s3_bucket": "not-there"}, "does not exist"),
        ({"aws_secret_access_key": "wrong-canary-secret"}, "credentials"),
        ({"s3_endpoint_url": "http://127.0.0.1:9"}, "does not answer"),
    ],
    ids=["bucket", "secret", "endpoint"],
)
async def test_a_server_with_a_bad_bucket_starts_and_says_so(
    s3_settings: Callable[..., Settings], changes: dict[str, str], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with serving(s3_settings(**changes)) as (server, models):
            await models.ListModels(models_pb2.ListModelsRequest())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await models.GetModel(models_pb2.GetModelRequest(name="models/shop"))
            assert said in (caught.value.details() or "")
            deadline = time.monotonic() + 60
            while Service.S3 not in (seen := server._state.observations()):
                assert time.monotonic() < deadline
            assert said in seen[Service.S3].trouble
    assert "canary" not in caplog.text


async def test_many_who_ask_for_one_version_wait_for_one_fetch(machines: Machines, proxy: FaultyProxy) -> None:
    publish(machines("a"), "job-1")
    registry = machines("b", proxied=True)
    servicer = InferenceServicer(registry, None, None)  # type: ignore[arg-type]  # neither is asked here
    version = registry.resolve("shop", None)
    proxy.faults, proxy.requests = [Fault("stall", "GET", WEIGHTS, times=1)], []
    calls = [asyncio.create_task(servicer._verify(version)) for _ in range(50)]
    await asyncio.to_thread(wait_until, lambda: proxy.count("GET", WEIGHTS))
    # Meanwhile everybody else finds a thread.
    assert await asyncio.wait_for(_in(servicer._threads, registry.resolve, "shop", 1), 5) == version
    calls.pop().cancel()  # one who leaves ends nothing for the others
    await asyncio.gather(*calls)
    assert proxy.count("GET", WEIGHTS) == 2  # the one that stalled, and its repetition
    assert weights_of(registry.folder("shop", 1) / WEIGHTS) == b"weights"
    # Once is enough, until the engine finds that the files are not what they were.
    (registry.folder("shop", 1) / WEIGHTS).unlink()
    await servicer._verify(version)
    servicer._verified.clear()
    await servicer._verify(version)
    assert weights_of(registry.folder("shop", 1) / WEIGHTS) == b"weights"


@pytest.mark.slow
async def test_a_bucket_that_hangs_holds_up_nobody_else(
    s3_settings: Callable[..., Settings], proxy: FaultyProxy, tmp_path: Path
) -> None:
    settings = s3_settings(s3_endpoint_url=proxy.url)
    async with serving(settings) as (server, models), grpc.aio.insecure_channel(server.address) as channel:
        await asyncio.to_thread(wait_until, lambda: Service.S3 in server._state.observations())
        proxy.faults = [Fault("stall")]
        calls = [models.GetModel(models_pb2.GetModelRequest(name=f"models/unknown-{n}")) for n in range(60)]
        await asyncio.sleep(0.5)
        await jobs_pb2_grpc.JobServiceStub(channel).ListJobs(jobs_pb2.ListJobsRequest(), timeout=5)
        for ended in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(ended, grpc.aio.AioRpcError)
            assert ended.code() is grpc.StatusCode.UNAVAILABLE
        await models.ListModels(models_pb2.ListModelsRequest(), timeout=5)


def test_without_a_bucket_the_library_is_never_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, asyncio; from pathlib import Path\n"
        "from knowledge_engine.registry import Registry; from knowledge_engine.settings import Settings\n"
        "from tests.test_registry import publish\n"
        "registry = Registry.open(Settings(data_dir=Path(sys.argv[1])))\n"
        "publish(registry, 'job-1'); registry.verify('shop', 1); registry.delete('shop', 1)\n"
        "print(sys.modules.keys() & {'boto3', 'botocore'})"
    )
    argv = [sys.executable, "-c", code, str(tmp_path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True, cwd=root)
    assert done.stdout.strip() == "set()"


_SPEC = TrainingSpec(dataset="talks", model="shop", max_steps=3, use_qlora=False, learning_rate=0.05)


def _talks() -> bytes:
    roles = ("user", "assistant")
    texts = [(f"Shoe {number}?", f"It costs {number} EUR.") for number in range(12)]
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, row, strict=True)]} for row in texts
    ]
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _variables(settings: Settings) -> dict[str, str]:
    return {
        "KNOWLEDGE_S3_BUCKET": settings.s3_bucket or "",
        "KNOWLEDGE_AWS_REGION": "us-east-1",
        "KNOWLEDGE_AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "KNOWLEDGE_AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "KNOWLEDGE_S3_PATIENCE_SECONDS": "5",
    }


@pytest.mark.slow
def test_a_worker_killed_while_it_publishes_trains_nothing_twice(
    tmp_path: Path, tiny_base: Path, s3_settings: Callable[..., Settings], proxy: FaultyProxy
) -> None:
    (tmp_path / "a").mkdir()
    proxy.faults = [Fault("stall", "PUT", "manifest.json", times=1)]
    service = start(tmp_path / "a", tiny_base, **_variables(s3_settings()), KNOWLEDGE_S3_ENDPOINT_URL=proxy.url)
    try:
        with Client(service.grpc_address) as client:
            client.upload_dataset("talks", _talks())
            job = client.create_training_job(_SPEC)
            wait_until(lambda: proxy.count("PUT", "manifest.json"), 120)
            for process in service.family():
                if "knowledge_engine.worker" in process.cmdline():
                    process.kill()
            events = [event.payload for event in client.watch_job(job.id)]
            assert client.get_job(job.id).state is JobState.SUCCEEDED
            trained = [item.step for item in events if isinstance(item, Progress) and item.phase == "training"]
            assert trained == [1, 2, 3]
            assert any("nothing to train" in item.message for item in events if isinstance(item, LogLine))
            assert client.get_model_version("shop", 1).job_id == job.id
    finally:
        end(service)


@pytest.mark.slow
def test_what_one_service_trains_the_other_answers_with_after_a_bad_day(
    tmp_path: Path, tiny_base: Path, s3_settings: Callable[..., Settings], seaweed: Seaweed, proxy: FaultyProxy
) -> None:
    variables = _variables(s3_settings())
    question = [{"role": "user", "content": "Shoe 3?"}]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    proxy.faults = [Fault("slow down", "PUT", "manifest.json")]
    a = start(tmp_path / "a", tiny_base, **variables, KNOWLEDGE_S3_ENDPOINT_URL=proxy.url)
    b = start(tmp_path / "b", tiny_base, **variables, KNOWLEDGE_S3_ENDPOINT_URL=seaweed.endpoint)
    try:
        with Client(a.grpc_address) as on_a, Client(b.grpc_address) as on_b:
            on_a.upload_dataset("talks", _talks())
            first = [event.payload for event in on_a.watch_job(on_a.create_training_job(_SPEC).id)]
            failed = first[-1]
            assert isinstance(failed, StateChange)
            assert (failed.state, (failed.error or {})["reason"]) == (JobState.FAILED, "STORAGE_UNREACHABLE")
            assert "503 SlowDown" in failed.error["message"]
            assert [item.reason for item in first if isinstance(item, JobWarning)][:1] == ["STORAGE_UNREACHABLE"]
            assert "training" in {item.phase for item in first if isinstance(item, Progress)}
            assert list(on_b.list_models()) == []

            proxy.faults = []
            second = [event.payload for event in on_a.watch_job(on_a.create_training_job(_SPEC).id)]
            done = second[-1]
            assert isinstance(done, StateChange)
            assert done.state is JobState.SUCCEEDED
            assert any("nothing to train" in item.message for item in second if isinstance(item, LogLine))
            assert "training" not in {item.phase for item in second if isinstance(item, Progress)}
            assert not list((tmp_path / "a" / "unpublished").iterdir())

            wait_until(lambda: is_serving(a) and is_serving(b))
            answers = [client.generate("shop", question, temperature=0, max_tokens=12) for client in (on_a, on_b)]
            base = on_b.generate("base", question, temperature=0, max_tokens=12)
            assert answers[0].text == answers[1].text != base.text
            assert answers[0].completion.digest == answers[1].completion.digest
            assert "s3" in on_b.health()
    finally:
        end(a)
        end(b)
