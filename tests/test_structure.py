"""The shape of the house: what the control process imports, and a README that names every module."""

import subprocess
import sys
from pathlib import Path

import pytest

from knowledge_engine.v1 import datasets_pb2, inference_pb2, jobs_pb2, models_pb2

ROOT = Path(__file__).parent.parent
SERVICES = [
    service
    for module in (jobs_pb2, datasets_pb2, models_pb2, inference_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
]


@pytest.mark.parametrize(
    "module",
    ["knowledge_engine.server.app", "gateway.app", "knowledge_engine.cli", "knowledge_engine.supervisor"],
)
def test_a_control_process_imports_neither_torch_nor_transformers(module: str) -> None:
    heavy = (
        "{'torch', 'transformers', 'peft', 'bitsandbytes', 'numba', 'wandb', 'openai', 'boto3', 'opentelemetry.sdk'}"
    )
    code = f"import sys, {module}; print(sorted(sys.modules.keys() & {heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_the_readme_maps_every_module() -> None:
    readme = (ROOT / "README.md").read_text()
    source = ROOT / "src" / "knowledge_engine"
    modules = [
        path.relative_to(ROOT).as_posix().removeprefix("src/knowledge_engine/")
        for folder in (source, ROOT / "gateway", ROOT / "scripts")
        for path in folder.rglob("*.py")
        if not path.name.startswith("__") and not {"v1", "migrations"} & set(path.parts)
    ]
    missing = [module for module in sorted(modules) if f"`{module}`" not in readme]
    assert not missing


def test_every_rpc_has_a_route() -> None:
    from gateway.app import create_app
    from knowledge_engine.settings import Settings

    openapi = create_app(Settings()).openapi()
    served = {operation.get("x-rpc") for path in openapi["paths"].values() for operation in path.values()} | {
        "InferenceService.StreamGenerate"
    }
    wanted = {f"{service.name}.{method.name}" for service in SERVICES for method in service.methods}
    assert wanted <= served


def test_the_vendored_protos_are_those_of_the_library() -> None:
    import google.rpc

    library = Path(google.rpc.__path__[0]).parent
    for vendored in (ROOT / "protos" / "google").rglob("*.proto"):
        assert vendored.read_bytes() == (library / vendored.relative_to(ROOT / "protos" / "google")).read_bytes()
