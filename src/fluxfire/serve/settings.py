"""What an operator sets: by option of `fluxfire serve`, by environment (`FLUXFIRE_MAX_STEPS=50`), or in `.env`.

Secrets are `SecretStr`: printed as stars. `Settings.secrets()` lists them for the log's filter.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from fluxfire.errors import ArgumentError

MIB: Final = 2**20
Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]


class ApiKey(BaseModel):
    """Somebody who may ask for pictures."""

    name: Annotated[str, Field(min_length=1)]  # for the log and the metrics
    key: Annotated[SecretStr, Field(min_length=16)]
    pictures_per_minute: Positive | None = None  # None: as many as the queue takes


class Settings(BaseSettings):
    """Every setting with its default. Its comment is its line in docs/serving.md."""

    model_config = SettingsConfigDict(
        env_prefix="FLUXFIRE_",
        env_file=".env",
        env_parse_none_str="null",
        extra="ignore",
        frozen=True,
        protected_namespaces=(),
    )

    # The model
    model: str = "embedded"  # "embedded"; a folder or Hub repository; "module:function" that makes the pipeline
    name: str | None = None  # what clients call it; None: its own
    device: str = "auto"  # a GPU if there is one
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # float32 on a CPU, else bfloat16
    cache_threshold: Annotated[float, Field(ge=0)] | None = 0.12  # for requests that say none; null: no cache at all
    compile: bool | Literal["auto"] = "auto"  # on a GPU; on a CPU it takes 20 s and more at every start
    megacache: str = "auto"  # where compiled blocks are found: auto, a folder, or a URL with signed ones
    megacache_share: bool = False  # put those compiled here at that URL, signed with this user's key
    warm_sizes: tuple[tuple[Positive, Positive], ...] = ()  # (width, height); none: the model's own size
    hf_token: SecretStr | None = Field(None, validation_alias="HF_TOKEN")  # for gated models; the worker gets it

    # Who may connect
    host: str = "127.0.0.1"  # the address to listen on
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # 0: a free one
    api_keys: tuple[ApiKey, ...] = ()  # [{"name", "key", "pictures_per_minute"}, ...]; none: everybody may ask
    public_url: str | None = None  # the server's, in the URLs of pictures; none: the Host that clients name

    # How much
    max_body_bytes: Positive = 20 * MIB  # of a request
    max_input_pixels: Positive = 2**24  # of a picture to edit, looked up before it is decoded
    max_pixels: Positive = 2048 * 2048  # of a picture to make
    max_steps: Positive = 100  # of a picture
    max_pictures: Positive = 10  # of a request
    max_open_requests: Positive = 512  # with a body, at once; more get 503
    max_open_bytes: Positive = 256 * MIB  # of the bodies of all open requests; more get 503
    max_connections: Positive = 800  # at once; more are closed. Below the usual limit of 1024 open files
    max_batch: Positive = 4  # pictures made together
    queue_cost: Positive = 32 * 28 * 1024 * 1024  # pixels x steps that may wait: 32 pictures of 1024x1024, 28 steps
    idempotency_bytes: Positive = 256 * MIB  # of pictures kept for requests that are repeated

    # How long
    deadline_s: Seconds = 600.0  # in the queue and running
    head_s: Seconds = 10.0  # to send a request's head, from the connection on
    body_s: Seconds = 30.0  # to send a request's body
    read_s: Seconds = 60.0  # in which a client must take some of its answer
    drain_s: Seconds = 120.0  # after SIGTERM
    silence_s: Seconds = 300.0  # after which a worker that should be denoising is taken for hung
    idempotency_s: Seconds = 600.0  # in which a repeated Idempotency-Key gets the first one's pictures

    # Where pictures are kept when a URL is asked for
    storage: Literal["local", "s3"] = "local"  # a directory, or S3 and what speaks like it
    storage_dir: Path = Path("fluxfire-pictures")  # of "local", also as a fallback
    storage_fallback: Literal["base64", "local", "error"] = "base64"  # when storing fails
    url_s: Annotated[int, Field(gt=0, le=7 * 24 * 3600)] = 3600  # how long a URL works
    s3_bucket: str | None = None  # must exist
    s3_endpoint: str | None = None  # for R2: https://ACCOUNT.r2.cloudflarestorage.com
    s3_region: str = "auto"  # AWS wants its own
    s3_access_key_id: SecretStr | None = None  # with the right to put and get objects
    s3_secret_access_key: SecretStr | None = None  # of that key

    @model_validator(mode="after")
    def _one_body_fits(self) -> Self:
        if self.max_open_bytes < self.max_body_bytes:
            raise ValueError("max_open_bytes is less than max_body_bytes: the largest body would never be taken")
        return self

    @model_validator(mode="after")
    def _storage_is_whole(self) -> Self:
        needed = ("s3_bucket", "s3_access_key_id", "s3_secret_access_key")
        if self.storage == "s3" and (missing := [name for name in needed if not getattr(self, name)]):
            raise ValueError(f"storage is s3, which needs {', '.join(f'FLUXFIRE_{name.upper()}' for name in missing)}")
        return self

    def secrets(self) -> tuple[str, ...]:
        """Every secret's value."""
        single = (self.hf_token, self.s3_access_key_id, self.s3_secret_access_key)
        keys = (key.key for key in self.api_keys)
        return tuple(secret.get_secret_value() for secret in (*single, *keys) if secret)

    def worker_environment(self) -> dict[str, str]:
        """The worker's environment: ours without what is only ours, and the Hub's token, which it may need."""
        own = {name: value for name, value in os.environ.items() if not name.startswith("FLUXFIRE_")}
        token = {"HF_TOKEN": self.hf_token.get_secret_value()} if self.hf_token else {}
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return quiet | own | token

    def worker_options(self) -> dict[str, Any]:
        """What the worker is started with; no secrets. `auto` is decided here."""
        import torch

        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        on_cpu = device.startswith("cpu")
        return {
            "model": self.model,
            "name": self.name,
            "device": device,
            "dtype": ("float32" if on_cpu else "bfloat16") if self.dtype == "auto" else self.dtype,
            "cache_threshold": self.cache_threshold,
            "compile": not on_cpu if self.compile == "auto" else self.compile,
            "megacache": self.megacache,
            "share": self.megacache_share,
            "warm_sizes": self.warm_sizes,
            "max_batch": self.max_batch,
        }


def read_settings(given: dict[str, Any]) -> Settings:
    """The settings, those given by hand before those of the environment.

    Raises:
        ArgumentError: which ones cannot be used; without the values, some of which are secrets.
    """
    try:
        return Settings(**given)
    except ValidationError as error:
        told = ((".".join(map(str, found["loc"])), found["msg"]) for found in error.errors(include_input=False))
        lines = [f"{name}: {text}" if name else text.removeprefix("Value error, ") for name, text in told]
        raise ArgumentError("; ".join(lines)) from None
    except SettingsError as error:
        raise ArgumentError(str(error)) from None


def secret_names() -> frozenset[str]:
    """The settings that have secrets in them."""
    fields = Settings.model_fields.items()
    return frozenset(name for name, field in fields if "SecretStr" in str(field.annotation) or name == "api_keys")
