"""Settings: one broken line stops the start and says what is allowed; secrets stay secret."""

from pathlib import Path

import pytest

from knowledge_engine.errors import InvalidSpecError, Reason
from knowledge_engine.settings import _ALIASES, Settings, load_settings

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in list(os.environ):
        if name.startswith("KNOWLEDGE_") or name in _ALIASES:
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("KNOWLEDGE_DATADIR", "/x", "did you mean KNOWLEDGE_DATA_DIR?"),
        ("KNOWLEDGE_QUUX", "1", "known are"),
        ("KNOWLEDGE_GRPC_ADDRESS", "50051", "not host:port"),
        ("KNOWLEDGE_GRPC_ADDRESS", "127.0.0.1:99999", "not host:port"),
        ("KNOWLEDGE_GRPC_ADDRESS", "0.0.0.0:50051", "KNOWLEDGE_ALLOW_ANONYMOUS=true"),
        ("KNOWLEDGE_HTTP_ADDRESS", "shop.example:80", "KNOWLEDGE_API_KEYS"),
        ("KNOWLEDGE_MAX_CONCURRENT_TRAININGS", "0", "KNOWLEDGE_MAX_CONCURRENT_TRAININGS"),
        ("KNOWLEDGE_MAX_CONCURRENT_TRAININGS", "many", "KNOWLEDGE_MAX_CONCURRENT_TRAININGS"),
        ("KNOWLEDGE_TRAINING_DEVICES", "0", "KNOWLEDGE_TRAINING_DEVICES"),
        ("KNOWLEDGE_LEASE_SECONDS", "nan", "KNOWLEDGE_LEASE_SECONDS"),
        ("KNOWLEDGE_ALLOW_ANONYMOUS", "perhaps", "KNOWLEDGE_ALLOW_ANONYMOUS"),
        ("KNOWLEDGE_API_KEYS", "no-separator", "name:key"),
        ("KNOWLEDGE_API_KEYS", "a:short", "at least 8 characters"),
        ("KNOWLEDGE_API_KEYS", "a:schlüssel-lang", "printable ASCII"),
        ("KNOWLEDGE_API_KEYS", "a:long-enough,a:also-long-enough", "repeats"),
        ("KNOWLEDGE_BASE_MODELS", "just-a-folder", "slug=folder"),
        ("KNOWLEDGE_BASE_MODELS", "base=/x", "no free name"),
        ("KNOWLEDGE_S3_ENDPOINT_URL", "http://127.0.0.1:9", "KNOWLEDGE_S3_BUCKET"),
        ("KNOWLEDGE_AWS_ACCESS_KEY_ID", "an-id", "both or neither"),
        ("KNOWLEDGE_OPENAI_INPUT_PRICE", "0.4", "both or neither"),
        ("KNOWLEDGE_OPENAI_BASE_URL", "ftp://models", "http(s) URL"),
        ("KNOWLEDGE_OPENAI_BASE_URL", "https://user:pass@models", "http(s) URL"),
        ("KNOWLEDGE_HUGGINGFACE_ENDPOINT", "hub", "http(s) URL"),
        ("KNOWLEDGE_SERVING_PRECISION", "int4", "KNOWLEDGE_SERVING_PRECISION"),
    ],
)
def test_a_bad_setting_stops_the_start(monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidSpecError) as caught:
        load_settings(env_file=None)
    assert caught.value.reason is Reason.SETTINGS_INVALID
    assert says in caught.value.message
    assert "\n" not in caught.value.message


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("KNOWLEDGE_MAX_CONCURRENT_TRAININGS=2\nKNOWLEDGE_WANDB_PROJECT=from-file\n")
    monkeypatch.setenv("KNOWLEDGE_WANDB_PROJECT", "from-environment")
    settings = load_settings(env_file=file)
    assert settings.max_concurrent_trainings == 2
    assert settings.wandb_project == "from-environment"


def test_an_unknown_name_in_the_file_stops_the_start(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("KNOWLEDGE_WANDB_PROJEKT=x\n")
    with pytest.raises(InvalidSpecError, match="KNOWLEDGE_WANDB_PROJECT"):
        load_settings(env_file=file)


def test_an_empty_optional_secret_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWLEDGE_WANDB_API_KEY", "")
    monkeypatch.setenv("KNOWLEDGE_API_KEYS", "")
    settings = load_settings(env_file=None)
    assert settings.wandb_api_key is None
    assert settings.anonymous


def test_a_service_may_name_its_secret_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "canary-wandb")
    settings = load_settings(env_file=None)
    assert settings.wandb_api_key is not None
    assert settings.wandb_api_key.get_secret_value() == "canary-wandb"


def test_no_message_and_no_repr_holds_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWLEDGE_WANDB_API_KEY", "canary-wandb")
    monkeypatch.setenv("KNOWLEDGE_API_KEYS", "shop:canary-key")
    assert "canary" not in repr(load_settings(env_file=None))
    monkeypatch.setenv("KNOWLEDGE_API_KEYS", "shop:canary-key,shop:canary-key-2")
    with pytest.raises(InvalidSpecError) as caught:
        load_settings(env_file=None)
    assert "canary" not in str(caught.value)


def test_keys_make_a_public_address_legal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KNOWLEDGE_HTTP_ADDRESS", "0.0.0.0:8001")
    monkeypatch.setenv("KNOWLEDGE_API_KEYS", "shop:a-long-key")
    assert load_settings(env_file=None).keys == {"shop": "a-long-key"}


def test_a_child_process_gets_the_same_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(
        data_dir=tmp_path,
        base_models={"tiny": "/models/tiny"},
        allowed_origins=("https://a.example", "https://b.example"),
        pinned_models=("shop", "garden:3"),
        api_keys="shop:a-long-key",
        wandb_api_key="canary",
        lease_seconds=0.5,
        serving_precision="nf4",
    )
    for name, value in settings.environment().items():
        monkeypatch.setenv(name, value)
    assert load_settings(env_file=None) == settings


def test_the_example_file_names_every_setting_and_is_accepted() -> None:
    example = ROOT / "config" / ".env.example"
    settings = load_settings(env_file=example)
    text = example.read_text()
    for name in Settings.model_fields:
        assert f"KNOWLEDGE_{name.upper()}=" in text, name
    assert settings == load_settings(env_file=None)
