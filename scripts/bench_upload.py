"""A large upload through a real server: `uv run python scripts/bench_upload.py [--gigabytes 1]`.

Conversations are made on the fly and streamed over gRPC; the server's resident memory is sampled all the while. Told
are megabytes per second, what the server grew by, and the same beside the plain way: `json.loads` of every line of the
same content, kept in a list. `--check` exits 1 when the server grew by more than 64 MiB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

import psutil

from knowledge_engine.client import Client

MAX_GROWTH_BYTES = 64 * 2**20
_SERVER = """
import asyncio, sys
from knowledge_engine.server.app import start_server
from knowledge_engine.settings import Settings

async def main():
    async with await start_server(Settings()) as server:
        print(server.address, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""
_PLAIN = """
import json, sys, time
began = time.perf_counter()
kept = [json.loads(line) for line in sys.stdin.buffer]
status = open("/proc/self/status").read()
peak = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
print(json.dumps({"seconds": time.perf_counter() - began, "peak_bytes": peak}))
"""


def lines(size: int) -> Iterator[bytes]:
    """Conversations of about a kilobyte, no two alike, until there are `size` bytes."""
    filler = "It is in stock, comes in three colours and can be returned within thirty days. " * 10
    made = 0
    number = 0
    while made < size:
        number += 1
        row = {
            "messages": [
                {"role": "user", "content": f"Do you have number {number}?"},
                {"role": "assistant", "content": f"Yes, number {number}. {filler}"},
            ]
        }
        line = json.dumps(row).encode() + b"\n"
        made += len(line)
        yield line


class Stream:
    """A file of lines that nobody holds."""

    def __init__(self, size: int) -> None:
        self._lines = lines(size)
        self.num_bytes = 0

    def read(self, size: int = -1) -> bytes:
        piece = b""
        for line in self._lines:
            piece += line
            if len(piece) >= size:
                break
        self.num_bytes += len(piece)
        return piece


def upload(size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="bench-upload-") as folder:
        environment = os.environ | {"KNOWLEDGE_DATA_DIR": folder, "KNOWLEDGE_GRPC_ADDRESS": "127.0.0.1:0"}
        with subprocess.Popen([sys.executable, "-c", _SERVER], stdout=subprocess.PIPE, env=environment) as server:
            try:
                assert server.stdout is not None
                address = server.stdout.readline().decode().strip()
                return _upload(address, psutil.Process(server.pid), size) | {"disk_bytes": _size(Path(folder))}
            finally:
                server.terminate()


def _upload(address: str, server: psutil.Process, size: int) -> dict[str, Any]:
    with Client(address) as client:
        client.upload_dataset("warm", b"".join(lines(2**20)))
        before = peak = server.memory_info().rss
        is_over = threading.Event()

        def sample() -> None:
            nonlocal peak
            while not is_over.wait(0.05):
                peak = max(peak, server.memory_info().rss)

        sampler = threading.Thread(target=sample)
        sampler.start()
        content, began = Stream(size), time.perf_counter()
        stored = client.upload_dataset("large", cast("BinaryIO", content))
        seconds = time.perf_counter() - began
        is_over.set()
        sampler.join()
    return {
        "num_rows": stored.num_rows,
        "num_bytes": content.num_bytes,
        "seconds": seconds,
        "before_bytes": before,
        "growth_bytes": peak - before,
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "datasets").glob("*.jsonl"))


def plain(size: int) -> dict[str, Any]:
    with subprocess.Popen([sys.executable, "-c", _PLAIN], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in lines(size):
            process.stdin.write(line)
        process.stdin.close()
        return dict(json.loads(process.stdout.read()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--check", action="store_true", help="exit 1 when memory is not flat")
    arguments = parser.parse_args()
    size = round(arguments.gigabytes * 1e9)
    ours, peer = upload(size), plain(size)
    if arguments.json:
        print(json.dumps({"ours": ours, "plain": peer}))
    else:
        speed = ours["num_bytes"] / 1e6 / ours["seconds"]
        before, grown, kept = (
            size / 2**20 for size in (ours["before_bytes"], ours["growth_bytes"], peer["peak_bytes"])
        )
        print(
            f"{ours['num_rows']} rows, {ours['num_bytes'] / 1e6:.0f} MB in {ours['seconds']:.0f} s ({speed:.0f} MB/s)"
        )
        print(f"the server had {before:.0f} MiB and grew by {grown:.0f} MiB")
        print(f"json.loads of every line, kept: {kept:.0f} MiB in {peer['seconds']:.0f} s ({grown / kept:.4f}x)")
    return int(arguments.check and ours["growth_bytes"] > MAX_GROWTH_BYTES)


if __name__ == "__main__":
    sys.exit(main())
