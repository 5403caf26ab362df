"""The bucket on a real S3 server, straight and through a proxy that misbehaves; every upstream error becomes ours."""

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import botocore.exceptions
import pytest

from knowledge_engine.errors import CredentialsError, KnowledgeEngineError, Reason, UpstreamError
from knowledge_engine.settings import Settings
from knowledge_engine.storage import PART_BYTES, Bucket, probe
from tests.faulty_proxy import Fault, FaultyProxy
from tests.seaweed import ACCESS_KEY, SECRET_KEY, Seaweed


@pytest.fixture
def bucket(make_bucket: Callable[..., Bucket]) -> Bucket:
    return make_bucket()


@pytest.fixture
def proxied(make_bucket: Callable[..., Bucket], proxy: FaultyProxy) -> Bucket:
    return make_bucket(s3_endpoint_url=proxy.url)


@pytest.fixture
def hasty(make_bucket: Callable[..., Bucket], proxy: FaultyProxy) -> Bucket:
    """For answers that never come; where they do, a busy machine needs longer at times."""
    return make_bucket(s3_endpoint_url=proxy.url, read_seconds=1)


def no_check() -> None:
    pass


def test_objects_come_back_as_they_were_put(bucket: Bucket, tmp_path: Path) -> None:
    assert bucket.get("a/none") is None
    assert not bucket.download("a/none", tmp_path / "none", 10)
    assert bucket.put("a/small", b"content")
    bucket.put("a/empty", b"")
    assert bucket.get("a/small") == b"content"
    assert bucket.get("a/empty") == b""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    bucket.upload("a/file", path, "0" * 64, no_check)
    assert bucket.download("a/file", tmp_path / "copy", 1000)
    assert (tmp_path / "copy").read_bytes() == b"x" * 1000
    assert [(stored.key, stored.size_bytes) for stored in bucket.list_objects("a/")] == [
        ("a/empty", 0),
        ("a/file", 1000),
        ("a/small", 7),
    ]
    bucket.delete(["a/file", "a/never"])
    bucket.delete(["a/file"])
    assert [stored.key for stored in bucket.list_objects("")] == ["a/empty", "a/small"]


@pytest.mark.slow
def test_a_listing_has_more_than_one_page(bucket: Bucket) -> None:
    keys = [f"k/{index:04}" for index in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda key: bucket.put(key, b""), keys))
    assert [stored.key for stored in bucket.list_objects("k/")] == keys
    bucket.delete(keys)
    assert bucket.list_objects("k/") == []


def test_of_many_conditional_writers_one_wins(bucket: Bucket) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda index: bucket.put("key", str(index).encode(), only_new=True), range(8)))
    assert won.count(True) == 1
    assert bucket.get("key") == str(won.index(True)).encode()


def test_a_big_file_travels_in_parts_and_only_once(proxied: Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(bytes(range(256)) * (PART_BYTES // 256) + b"tail")
    digest = "a" * 64
    proxied.upload("big", path, digest, no_check)
    assert proxy.count("PUT", "uploadId") == 2
    proxied.upload("big", path, digest, no_check)
    assert proxy.count("PUT") == 2
    proxied.upload("big", path, "b" * 64, no_check)
    assert proxy.count("PUT") == 4
    assert proxied.download("big", tmp_path / "copy", PART_BYTES + 4)
    assert (tmp_path / "copy").read_bytes() == path.read_bytes()


def test_a_download_stops_where_it_has_more_than_it_should(bucket: Bucket, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * (8 * 2**20))
    bucket.upload("file", path, "0" * 64, no_check)
    assert bucket.download("file", tmp_path / "copy", 10)
    assert (tmp_path / "copy").stat().st_size < 4 * 2**20


def test_an_upload_that_is_stopped_leaves_nothing(bucket: Bucket, seaweed: Seaweed, tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"x" * (3 * PART_BYTES))

    def stop() -> None:
        raise KeyError("stopped")

    with pytest.raises((KeyError, UpstreamError)):
        bucket.upload("big", path, "0" * 64, stop)
    assert bucket.list_objects("") == []
    assert "Uploads" not in seaweed.client.list_multipart_uploads(Bucket=bucket.name)


def test_unfinished_uploads_are_ended_by_age(bucket: Bucket, seaweed: Seaweed) -> None:
    for key in ("models/a", "models/b", "other"):
        seaweed.client.create_multipart_upload(Bucket=bucket.name, Key=key)
    now = datetime.now(UTC)
    assert bucket.abort_uploads("models/", now - timedelta(hours=1), lambda key: True) == 0
    assert bucket.abort_uploads("models/", now + timedelta(hours=1), lambda key: key != "models/b") == 1
    left = seaweed.client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
    assert {upload["Key"] for upload in left} == {"models/b", "other"}


@pytest.mark.parametrize("kind", ["slow down", "reset", "lost"])
def test_short_trouble_is_not_noticed(proxied: Bucket, proxy: FaultyProxy, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "big"
    path.write_bytes(b"x" * (PART_BYTES + 1))
    proxy.faults = [Fault(kind, "PUT", times=2)]
    proxied.upload("big", path, "0" * 64, no_check)
    proxy.faults = [Fault(kind, "PUT", times=1), Fault(kind, "GET", times=1)]
    proxied.put("small", b"content")
    assert proxied.get("small") == b"content"


def test_a_body_that_breaks_off_is_fetched_again(proxied: Bucket, proxy: FaultyProxy, tmp_path: Path) -> None:
    proxied.put("key", b"content" * 1000)
    proxy.faults = [Fault("truncate", "GET", times=2)]
    assert proxied.get("key") == b"content" * 1000
    proxy.faults = [Fault("truncate", "GET", times=2)]
    assert proxied.download("key", tmp_path / "copy", 7000)
    assert (tmp_path / "copy").read_bytes() == b"content" * 1000


@pytest.mark.parametrize("kind", ["500", "cut", "stall", "truncate"])
def test_lasting_trouble_is_unreachable_within_bounds(hasty: Bucket, proxy: FaultyProxy, kind: str) -> None:
    hasty.put("key", b"content")
    proxy.requests.clear()
    proxy.faults = [Fault(kind, "GET")]
    with pytest.raises(UpstreamError) as caught:
        hasty.get("key")
    assert caught.value.reason is Reason.STORAGE_UNREACHABLE
    assert hasty.name in caught.value.message
    assert proxy.count("GET") == 3


def test_an_endpoint_that_is_not_there_is_unreachable(make_bucket: Callable[..., Bucket]) -> None:
    with pytest.raises(UpstreamError) as caught:
        make_bucket(s3_endpoint_url="http://127.0.0.1:9").list_objects("")
    assert caught.value.reason is Reason.STORAGE_UNREACHABLE


@pytest.mark.parametrize("kind", ["expired", "unknown key"])
def test_refused_credentials_are_tried_once(proxied: Bucket, proxy: FaultyProxy, kind: str) -> None:
    proxy.faults = [Fault(kind)]
    with pytest.raises(CredentialsError) as caught:
        proxied.put("key", b"content")
    assert caught.value.reason is Reason.UPSTREAM_CREDENTIALS
    assert len(proxy.requests) == 1
    proxy.faults = []
    assert proxied.put("key", b"content")


def test_a_wrong_secret_is_a_matter_of_credentials(make_bucket: Callable[..., Bucket]) -> None:
    bucket = make_bucket(aws_secret_access_key="wrong-canary-secret")
    for call in (bucket.check, lambda: bucket.get("x"), lambda: bucket.delete(["x"]), lambda: bucket.list_objects("")):
        with pytest.raises(CredentialsError) as caught:
            call()
        assert "canary" not in repr(caught.value.to_dict())


def test_no_credentials_at_all_is_said(
    make_bucket: Callable[..., Bucket], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(CredentialsError, match="no credentials"):
        make_bucket(aws_access_key_id=None, aws_secret_access_key=None).check()


def test_a_missing_bucket_is_named(make_bucket: Callable[..., Bucket]) -> None:
    bucket = make_bucket(s3_bucket="not-there")
    for call in (bucket.check, lambda: bucket.get("x"), lambda: bucket.put("x", b""), lambda: bucket.list_objects("")):
        with pytest.raises(UpstreamError, match=r"'not-there'.*does not exist.*KNOWLEDGE_S3_BUCKET"):
            call()


def test_a_name_that_is_none_is_a_wrong_setting(make_bucket: Callable[..., Bucket]) -> None:
    with pytest.raises(KnowledgeEngineError) as caught:
        make_bucket(s3_bucket="not a name!").get("x")
    assert caught.value.reason is Reason.SETTINGS_INVALID


def test_the_probe_tells_good_from_bad(s3_settings: Callable[..., Settings], proxy: FaultyProxy) -> None:
    settings = s3_settings(s3_endpoint_url=proxy.url)
    probe(settings)
    assert len(proxy.requests) == 1
    for kind, error in (("500", UpstreamError), ("cut", UpstreamError), ("stall", UpstreamError)):
        proxy.faults = [Fault(kind)]
        with pytest.raises(error):
            probe(settings)
    proxy.faults = [Fault("expired")]
    with pytest.raises(CredentialsError):
        probe(settings)
    assert len(proxy.requests) == 5


def _upstream_errors(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from _upstream_errors(child)


def test_every_upstream_error_becomes_one_of_ours(bucket: Bucket) -> None:
    kinds = list(_upstream_errors(botocore.exceptions.BotoCoreError))
    assert len(kinds) > 50
    for kind in kinds:
        assert isinstance(bucket._translate(kind.__new__(kind)), KnowledgeEngineError), kind
    assert bucket._translate(OSError("disk full")) is None


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("SlowDown", 503, Reason.STORAGE_UNREACHABLE),
        ("PermanentRedirect", 301, Reason.STORAGE_UNREACHABLE),
        ("RequestTimeTooSkewed", 403, Reason.STORAGE_UNREACHABLE),
        ("ExpiredToken", 400, Reason.UPSTREAM_CREDENTIALS),
        ("AccessDenied", 403, Reason.UPSTREAM_CREDENTIALS),
        ("403", 403, Reason.UPSTREAM_CREDENTIALS),
        ("Unheard\nOf<script>" + "x" * 500, 418, Reason.STORAGE_UNREACHABLE),
    ],
)
def test_an_answers_code_decides(bucket: Bucket, code: str, status: int, reason: Reason) -> None:
    answer: dict[str, Any] = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    ours = bucket._translate(botocore.exceptions.ClientError(answer, "GetObject"))
    assert ours is not None
    assert ours.reason is reason
    assert "\n" not in ours.message
    assert len(ours.message) < 300


def test_no_secret_is_logged(proxied: Bucket, proxy: FaultyProxy, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        proxied.put("key", b"content")
        proxy.faults = [Fault("500")]
        with pytest.raises(UpstreamError) as caught:
            proxied.get("key")
    said = caplog.text + repr(caught.value) + str(caught.value.to_dict())
    assert SECRET_KEY not in said
    assert ACCESS_KEY not in said
