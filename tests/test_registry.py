"""Model versions on disk: whole or absent, immutable, checked, never renumbered."""

import json
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from knowledge_engine.bases import Base
from knowledge_engine.core import HeldOutComparison, ModelVersion, Page, TrainingSpec
from knowledge_engine.errors import IntegrityError, KnowledgeEngineError, NotFoundError, Reason
from knowledge_engine.registry import Registry

COMPARISON = HeldOutComparison(base_loss=2.5, tuned_loss=0.5, num_conversations=4, num_tokens=100, precision="float32")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models")


def publish(
    registry: Registry,
    job_id: str,
    model: str = "shop",
    weights: bytes = b"weights",
    check: Callable[[], None] = lambda: None,
) -> ModelVersion:
    content = save({"weights": np.frombuffer(weights, np.uint8)})
    return publish_content(registry, content, job_id, model, check)


def weights_of(path: Path) -> bytes:
    """What `publish` was given."""
    return bytes(load_file(path)["weights"])


def publish_content(
    registry: Registry,
    content: bytes,
    job_id: str = "job-1",
    model: str = "shop",
    check: Callable[[], None] = lambda: None,
) -> ModelVersion:
    folder = registry.stage(job_id)
    (folder / "adapter_model.safetensors").write_bytes(content)
    (folder / "adapter_config.json").write_text("{}")
    return registry.publish(
        spec=TrainingSpec(dataset="d", model=model),
        job_id=job_id,
        folder=folder,
        base=Base("base", Path("/nowhere"), "sha256:base", 512, "Llama", "tiny", 1),
        dataset_digest="sha256:data",
        chat_template_digest="sha256:template",
        comparison=COMPARISON,
        training_precision="nf4",
        check=check,
    )


def test_versions_count_up_and_the_newest_answers(registry: Registry) -> None:
    first, second = publish(registry, "job-1"), publish(registry, "job-2", weights=b"other")
    assert [first.version, second.version] == [1, 2]
    assert first.digest != second.digest
    assert registry.resolve("shop", None) == second
    assert registry.resolve("shop", 1) == first
    model = registry.get_model("shop")
    assert (model.num_versions, model.latest_version, model.create_time) == (2, second, first.create_time)
    assert first.comparison == COMPARISON


def test_what_was_published_is_read_back_by_another_process(registry: Registry, tmp_path: Path) -> None:
    published = publish(registry, "job-1")
    assert Registry(tmp_path / "models").get("shop", 1) == published
    manifest = json.loads((registry.folder("shop", 1) / "manifest.json").read_text())
    assert set(manifest["files"]) == {"adapter_model.safetensors", "adapter_config.json"}


def test_a_job_publishes_once(registry: Registry) -> None:
    assert publish(registry, "job-1") == publish(registry, "job-1")
    assert registry.get_model("shop").num_versions == 1


def test_many_jobs_publishing_at_once_get_different_numbers(registry: Registry) -> None:
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(lambda index: publish(registry, f"job-{index}").version, range(20)))
    assert sorted(versions) == list(range(1, 21))
    for version in versions:
        registry.verify("shop", version)


@pytest.mark.parametrize("how", ["flip", "truncate", "remove", "add"])
def test_a_tampered_file_is_refused_by_name(registry: Registry, how: str) -> None:
    publish(registry, "job-1")
    registry.verify("shop", 1)
    path = registry.folder("shop", 1) / "adapter_model.safetensors"
    match how:
        case "flip":
            path.write_bytes(b"weightz")
        case "truncate":
            path.write_bytes(b"wei")
        case "remove":
            path.unlink()
        case "add":
            path = path.with_name("extra.py")
            path.write_text("print('hello')")
    with pytest.raises(IntegrityError) as caught:
        registry.verify("shop", 1)
    assert caught.value.reason is Reason.MODEL_VERSION_CORRUPT
    assert caught.value.metadata["file"] == path.name


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"model": "other"}', "\0"])
def test_a_damaged_manifest_is_refused(registry: Registry, tmp_path: Path, text: str) -> None:
    publish(registry, "job-1")
    (registry.folder("shop", 1) / "manifest.json").write_text(text)
    with pytest.raises(IntegrityError) as caught:
        Registry(tmp_path / "models").get("shop", 1)
    assert caught.value.metadata["file"] == "manifest.json"


def test_a_staged_folder_is_invisible_and_goes_when_discarded(registry: Registry) -> None:
    folder = registry.stage("job-1")
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    assert registry.list_models(Page(10, None)) == ([], None)
    registry.discard_stage("job-1", 1)
    assert not folder.exists()


def test_a_deleted_version_is_gone_and_its_number_with_it(registry: Registry) -> None:
    publish(registry, "job-1")
    publish(registry, "job-2")
    registry.delete("shop", 2)
    assert not registry.folder("shop", 2).exists()
    with pytest.raises(NotFoundError) as caught:
        registry.get("shop", 2)
    assert caught.value.reason is Reason.MODEL_VERSION_NOT_FOUND
    assert publish(registry, "job-3").version == 3
    assert registry.resolve("shop", None).version == 3


def test_a_model_without_versions_is_not_listed(registry: Registry) -> None:
    publish(registry, "job-1")
    registry.delete("shop", 1)
    assert registry.list_models(Page(10, None)) == ([], None)
    with pytest.raises(NotFoundError) as caught:
        registry.get_model("shop")
    assert caught.value.reason is Reason.MODEL_NOT_FOUND


def test_models_and_versions_are_paged(registry: Registry) -> None:
    for index in range(5):
        publish(registry, f"job-{index}", model=f"shop-{index}")
    for index in range(5, 8):
        publish(registry, f"job-{index}", model="shop-0")
    first, after = registry.list_models(Page(3, None))
    second, end = registry.list_models(Page(3, after))
    assert [model.name for model in first + second] == [f"shop-{index}" for index in range(5)]
    assert end is None
    newest, after = registry.list_versions("shop-0", Page(3, None))
    oldest, end = registry.list_versions("shop-0", Page(3, after))
    assert [version.version for version in newest + oldest] == [4, 3, 2, 1]
    assert end is None


def test_files_are_private(registry: Registry) -> None:
    publish(registry, "job-1")
    folder = registry.folder("shop", 1)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "largest"])
def test_a_weight_that_is_no_number_is_never_published(registry: Registry, dtype: str, word: str) -> None:
    kinds = {"F64": (8, 0x7FF << 52), "F32": (4, 0xFF << 23), "F16": (2, 31 << 10), "BF16": (2, 255 << 7)}
    width, infinity = kinds[dtype]
    value = {"nan": infinity + 1, "inf": infinity, "-inf": infinity | 1 << 8 * width - 1, "largest": infinity - 1}[word]
    header = json.dumps({"lora_A": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * width]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(2 * width) + value.to_bytes(width, "little")
    if word == "largest":
        assert publish_content(registry, content).version == 1
        return
    with pytest.raises(KnowledgeEngineError, match="lora_A") as caught:
        publish_content(registry, content)
    assert caught.value.reason is Reason.NON_FINITE
    with pytest.raises(NotFoundError):
        registry.resolve("shop", None)


@pytest.mark.parametrize("content", [b"", b"garbage", b"\xff" * 100, (2).to_bytes(8, "little") + b"[]"], ids=str)
def test_what_is_no_file_of_weights_is_never_published(registry: Registry, content: bytes) -> None:
    with pytest.raises(IntegrityError, match="no file of weights") as caught:
        publish_content(registry, content)
    assert caught.value.reason is Reason.MODEL_VERSION_CORRUPT
