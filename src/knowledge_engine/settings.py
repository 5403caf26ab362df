"""How this deployment runs, read once from `KNOWLEDGE_*` and `config/.env`; the environment wins.

What one job does is a spec (`core.py`), never a setting. A name or value that is not understood stops the start with
one line that says what is allowed. Secrets are `SecretStr`, never printed; an empty optional one means unset.
"""

from __future__ import annotations

import difflib
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from knowledge_engine import failpoints
from knowledge_engine.core import BASE, is_name
from knowledge_engine.errors import InvalidSpecError, Reason

PREFIX = "KNOWLEDGE_"
ENV_FILE = Path("config/.env")


def _default_data_dir() -> Path:
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "knowledge-engine"


def _secret(*aliases: str) -> Any:
    """A secret under our own name, or under the name its service's own tools use."""
    return _alias(None, *aliases)


def _alias(default: str | None, *aliases: str) -> Any:
    return Field(default=default, validation_alias=AliasChoices(*aliases))


class Settings(BaseSettings):
    """One deployment's settings. Addresses are `host:port`; port 0 takes a free one."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, frozen=True, extra="ignore", populate_by_name=True
    )

    data_dir: Path = Field(default_factory=_default_data_dir)
    grpc_address: str = "127.0.0.1:50051"
    http_address: str = "127.0.0.1:8001"
    api_keys: SecretStr | None = None
    allow_anonymous: bool = False
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = ()
    reflection: bool = True

    base_model: str | None = None
    base_models: Annotated[dict[str, str], NoDecode] = Field(default_factory=dict)

    max_concurrent_trainings: int = Field(default=1, ge=1, le=5)
    training_devices: int = Field(default=1, ge=1, le=16)
    """GPUs that share the base and the steps of one training; on a CPU so many processes do, to try it out."""
    lease_seconds: float = Field(default=30, gt=0, le=600)
    cancel_grace_seconds: float = Field(default=8, gt=0, le=9)
    orphan_grace_seconds: float = Field(default=60, gt=0, le=3600)
    checkpoint_seconds: float = Field(default=120, gt=0, le=86_400)
    """Between two checkpoints of a training that names no `save_steps`."""
    memory_limit_bytes: int | None = Field(default=None, ge=2**20)
    """Memory of the device that trainings may count on; unset, all that the machine or its container has."""
    serving_precision: Literal["bfloat16", "float32", "int8", "nf4", "nf4-int8"] | None = None
    """How bases are kept while they answer. Unset, `int8` on a CPU for bases of Llama's shape, else bfloat16 on a GPU
    that has it, else float32. `nf4-int8` is int8 of what a QLoRA was trained on. What is trained while it is set can be
    served in it, too."""
    max_active_streams: int = Field(default=16, ge=1, le=1024)
    max_waiting_streams: int = Field(default=64, ge=0, le=4096)
    max_streams_per_caller: int | None = Field(default=None, ge=1)
    """The most answers, under way or waiting, of one API key; unset, as many as there is room for."""
    kv_cache_bytes: int | None = Field(default=None, ge=2**20)
    """Memory for keys and values of answers under way and of beginnings worth keeping; taken as it fills on a CPU, at
    once on a GPU. Unset, 1 GiB, or one whole context where that is more. Bases of architectures that `batched.py` does
    not know take what they need."""
    adapter_cache_bytes: int = Field(default=2**30, ge=0)
    """Memory for loaded adapters; those that answer, and those that are pinned, stay beyond it."""
    pinned_models: Annotated[tuple[str, ...], NoDecode] = ()
    """Models whose newest version stays loaded once it has answered, or versions (`name:3`) that do."""
    request_timeout_seconds: float = Field(default=300, gt=0, le=3600)
    write_timeout_seconds: float = Field(default=30, gt=0, le=3600)
    """How long a caller may leave unread what fills its connection before the call ends."""
    drain_seconds: float = Field(default=10, ge=0, le=300)

    openai_api_key: SecretStr | None = _secret("KNOWLEDGE_OPENAI_API_KEY", "OPENAI_API_KEY")
    openai_base_url: str = _alias("https://api.openai.com/v1", "KNOWLEDGE_OPENAI_BASE_URL", "OPENAI_BASE_URL")
    openai_model: str = "gpt-4.1-mini"
    openai_max_concurrency: int = Field(default=8, ge=1, le=256)
    openai_timeout_seconds: float = Field(default=60, gt=0, le=600)
    openai_input_price: float | None = Field(default=None, ge=0)
    """USD per million prompt tokens; without both prices no cost is told."""
    openai_output_price: float | None = Field(default=None, ge=0)
    huggingface_token: SecretStr | None = _secret("KNOWLEDGE_HUGGINGFACE_TOKEN", "HF_TOKEN")
    huggingface_endpoint: str = _alias("https://huggingface.co", "KNOWLEDGE_HUGGINGFACE_ENDPOINT", "HF_ENDPOINT")
    wandb_api_key: SecretStr | None = _secret("KNOWLEDGE_WANDB_API_KEY", "WANDB_API_KEY")
    wandb_base_url: str = _alias("https://api.wandb.ai", "KNOWLEDGE_WANDB_BASE_URL", "WANDB_BASE_URL")
    wandb_entity: str | None = None
    wandb_project: str = "knowledge-engine"
    s3_bucket: str | None = None
    s3_endpoint_url: str | None = None
    s3_patience_seconds: float = Field(default=600, ge=0, le=86_400)
    """How long a trained model waits for a bucket that does not answer before its job fails."""
    aws_region: str | None = _alias(None, "KNOWLEDGE_AWS_REGION", "AWS_REGION", "AWS_DEFAULT_REGION")
    aws_access_key_id: SecretStr | None = _secret("KNOWLEDGE_AWS_ACCESS_KEY_ID", "AWS_ACCESS_KEY_ID")
    aws_secret_access_key: SecretStr | None = _secret("KNOWLEDGE_AWS_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY")
    aws_session_token: SecretStr | None = _secret("KNOWLEDGE_AWS_SESSION_TOKEN", "AWS_SESSION_TOKEN")
    probe_seconds: float = Field(default=60, gt=0, le=3600)
    """Between two looks at the outside services that are set up; health tells what the last one saw."""

    @field_validator("grpc_address", "http_address")
    @classmethod
    def _address(cls, value: str) -> str:
        split_address(value)
        return value

    @field_validator("openai_base_url", "huggingface_endpoint", "wandb_base_url", "s3_endpoint_url")
    @classmethod
    def _url(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = urlsplit(value)
            is_url = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_url = False
        if not is_url or parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("write an http(s) URL without user, password, query or fragment")
        return value.rstrip("/")

    @field_validator("allowed_origins", "pinned_models", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        if isinstance(value, str):
            return tuple(entry.strip() for entry in value.split(",") if entry.strip())
        return value

    @field_validator("pinned_models")
    @classmethod
    def _pins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            name, separator, version = entry.partition(":")
            if not is_name(name) or name == BASE or (separator and not version.isdecimal()):
                raise ValueError(f"write name,name:version; {entry!r} is neither a model nor a version")
        return value

    @field_validator("base_models", mode="before")
    @classmethod
    def _base_models(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        bases: dict[str, str] = {}
        for entry in filter(None, (part.strip() for part in value.split(","))):
            slug, separator, source = entry.partition("=")
            if not separator or not source or not is_name(slug) or slug == BASE:
                raise ValueError(f"write slug=folder,slug=org/name; {entry!r} is not one, or its slug is no free name")
            bases[slug] = source
        return bases

    @field_validator("api_keys")
    @classmethod
    def _api_keys(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            parse_api_keys(value)
        return value

    @model_validator(mode="after")
    def _guarded(self) -> Settings:
        if self.s3_endpoint_url and not self.s3_bucket:
            raise ValueError("KNOWLEDGE_S3_ENDPOINT_URL: which bucket? Set KNOWLEDGE_S3_BUCKET too")
        if (self.aws_access_key_id is None) != (self.aws_secret_access_key is None):
            raise ValueError("AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY: set both or neither")
        if (self.openai_input_price is None) != (self.openai_output_price is None):
            raise ValueError("KNOWLEDGE_OPENAI_INPUT_PRICE and KNOWLEDGE_OPENAI_OUTPUT_PRICE: set both or neither")
        open_to = [a for a in (self.grpc_address, self.http_address) if not is_loopback(split_address(a)[0])]
        if open_to and self.api_keys is None and not self.allow_anonymous:
            raise ValueError(
                f"{open_to[0]} can be reached from other machines: set KNOWLEDGE_API_KEYS=name:key,... to demand a "
                "key, or KNOWLEDGE_ALLOW_ANONYMOUS=true to serve everyone"
            )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, dotenv_settings

    @property
    def anonymous(self) -> bool:
        """Whether callers need no key."""
        return self.api_keys is None

    @property
    def keys(self) -> Mapping[str, str]:
        """API keys by caller name."""
        return parse_api_keys(self.api_keys) if self.api_keys else {}

    @property
    def state_url(self) -> str:
        return f"sqlite:///{self.data_dir / 'state.db'}"

    def secrets(self) -> list[str]:
        """What must be seen nowhere: keys of callers and of services."""
        values = (getattr(self, name) for name in type(self).model_fields)
        secrets = [value.get_secret_value() for value in values if isinstance(value, SecretStr)]
        return [secret for secret in (*secrets, *self.keys.values()) if secret]

    def environment(self) -> dict[str, str]:
        """The settings as `KNOWLEDGE_*` variables, for child processes; they never travel in argv."""
        values: dict[str, str] = {}
        for name in type(self).model_fields:
            value = getattr(self, name)
            if value is None or value == {} or value == ():
                continue
            if isinstance(value, SecretStr):
                value = value.get_secret_value()
            elif isinstance(value, dict):
                value = ",".join(f"{key}={item}" for key, item in value.items())
            elif isinstance(value, tuple):
                value = ",".join(value)
            elif isinstance(value, bool):
                value = str(value).lower()
            values[f"{PREFIX}{name.upper()}"] = str(value)
        return values

    def child_environment(self) -> dict[str, str]:
        """This process's environment for a child process, with these settings and no second copy of any."""
        kept = {
            key: value
            for key, value in os.environ.items()
            if key == failpoints.VARIABLE or (not key.startswith(PREFIX) and key not in _ALIASES)
        }
        return kept | self.environment()


_ALIASES = frozenset(
    str(choice)
    for field in Settings.model_fields.values()
    if isinstance(field.validation_alias, AliasChoices)
    for choice in field.validation_alias.choices
    if not str(choice).startswith(PREFIX)
)
"""Names that other tools give to the same things."""

CLIENT_NAMES = frozenset({"KNOWLEDGE_SERVER", "KNOWLEDGE_API_KEY", "KNOWLEDGE_ONLY", failpoints.VARIABLE})
"""Read from the environment alone: by the command line and other clients, and by `failpoints.py` in tests."""


def load_settings(env_file: Path | None = ENV_FILE, **overrides: Any) -> Settings:
    """Reads the environment and `env_file`.

    Raises:
        InvalidSpecError: SETTINGS_INVALID for an unknown or bad name, with one line that says what is allowed.
    """
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields} | CLIENT_NAMES
    file = env_file if env_file is not None and env_file.is_file() else None
    names = dict.fromkeys(name for name in os.environ if name.upper().startswith(PREFIX))
    if file is not None:
        names |= dict.fromkeys(
            name.upper()
            for name in DotEnvSettingsSource(Settings, env_file=file).env_vars
            if name.upper().startswith(PREFIX)
        )
    for name in names:
        if name.upper() not in known:
            near = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.8)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise InvalidSpecError(f"unknown setting {name}: {hint}", reason=Reason.SETTINGS_INVALID, setting=name)
    try:
        return Settings(_env_file=file, **overrides)
    except ValidationError as error:
        item = error.errors(include_url=False, include_input=False, include_context=False)[0]
        message = item["msg"].removeprefix("Value error, ")
        if item["loc"]:
            name = str(item["loc"][0]).upper()
            name = name if name.startswith(PREFIX) else f"{PREFIX}{name}"
            message = f"{name}: {message}"
        raise InvalidSpecError(message, reason=Reason.SETTINGS_INVALID) from None


def split_address(address: str) -> tuple[str, int]:
    """`host:port` taken apart; IPv6 hosts stand in brackets.

    Raises:
        ValueError: it is not one.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"{address!r} is not host:port")
    return host.strip("[]"), int(port)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse_api_keys(keys: SecretStr) -> dict[str, str]:
    """`name:key,...` as key by caller name.

    Raises:
        ValueError: another shape, a short key, or a name or key twice. The message never holds a key.
    """
    parsed: dict[str, str] = {}
    for position, entry in enumerate(filter(None, (part.strip() for part in keys.get_secret_value().split(","))), 1):
        name, separator, key = entry.partition(":")
        if not separator or not is_name(name):
            raise ValueError(f"entry {position} is not name:key")
        if len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"the key of {name!r} must have at least 8 characters, printable ASCII without spaces")
        if name in parsed or key in parsed.values():
            raise ValueError(f"entry {position} repeats a name or a key")
        parsed[name] = key
    if not parsed:
        raise ValueError("write name:key,name:key")
    return parsed
