"""SeaweedFS, a real S3 server, as a child process on free loopback ports."""

from __future__ import annotations

import json
import secrets
import socket
import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ACCESS_KEY = "seaweed-access"
SECRET_KEY = "seaweed-secret-canary"
_PARTS = ("master", "filer", "volume", "s3", "admin")
_START_SECONDS = 60
_STARTS = 3
_PORT_TAKEN = ("address already in use", "Port allocation failed")


class Seaweed(NamedTuple):
    endpoint: str
    client: Any
    """A plain boto3 client: what an operator's own tools see."""

    def new_bucket(self) -> str:
        name = f"bucket-{secrets.token_hex(6)}"
        self.client.create_bucket(Bucket=name)
        return name

    def keys(self, bucket: str) -> list[str]:
        listed = self.client.list_objects_v2(Bucket=bucket)
        return sorted(item["Key"] for item in listed.get("Contents", []))

    def read(self, bucket: str, key: str) -> bytes:
        with self.client.get_object(Bucket=bucket, Key=key)["Body"] as body:
            content = body.read()
        assert isinstance(content, bytes)
        return content


@contextmanager
def seaweed(folder: Path) -> Iterator[Seaweed]:
    """Serves until the block ends; everything it stores lies in `folder`."""
    for start in range(_STARTS):
        kept = folder / str(start)
        port = _free_ports(1)[0]
        process = _start(kept, port)
        client = _client(f"http://127.0.0.1:{port}")
        try:
            if not _answers(client, process, kept):
                continue
            yield Seaweed(f"http://127.0.0.1:{port}", client)
            return
        finally:
            client.close()
            process.kill()  # what it stores is thrown away; asked nicely it takes seconds
            process.wait()
    raise AssertionError((kept / "weed.log").read_text())


def _start(folder: Path, s3_port: int) -> subprocess.Popen[bytes]:
    (folder / "data").mkdir(parents=True)
    config = folder / "s3.json"
    keys = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config.write_text(json.dumps({"identities": [{"name": "tests", "credentials": keys, "actions": actions}]}))
    names = [f"{part}.port{kind}" for part in _PARTS for kind in ("", ".grpc")]
    ports = dict(zip(names, _free_ports(len(names)), strict=True)) | {"s3.port": s3_port}
    ports |= {"s3.port.iceberg": 0, "s3.port.lance": 0}  # on fixed ports otherwise
    flags = {"dir": folder / "data", "ip": "127.0.0.1", "ip.bind": "127.0.0.1", "s3.config": config}
    flags |= {"master.telemetry": "false", "admin.ui": "false", "webdav": "false", "s3.autoCreateBucket": "false"}
    argv = [str(Path(sysconfig.get_path("scripts")) / "weed"), "mini"]
    argv += [f"-{name}={value}" for name, value in (flags | ports).items()]
    with (folder / "weed.log").open("wb") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, cwd=folder)


def _client(endpoint: str) -> Any:
    import boto3
    from botocore.config import Config

    return boto3.session.Session().client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(signature_version="s3v4", s3={"addressing_style": "path"}, retries={"total_max_attempts": 1}),
    )


def _answers(client: Any, process: subprocess.Popen[bytes], folder: Path) -> bool:
    """Waits until it takes a bucket; false where another process took one of its ports first."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="ready", Body=b"ready")
        except (BotoCoreError, ClientError):
            ended = process.poll() is not None
            log = (folder / "weed.log").read_text(errors="replace")
            if ended and any(words in log for words in _PORT_TAKEN):
                return False
            assert not ended, log
            assert time.monotonic() < deadline, log
            time.sleep(0.2)
        else:
            return True


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports: list[int] = [taken.getsockname()[1] for taken in sockets]
    for taken in sockets:
        taken.close()
    return ports
