"""Modal: the server of `fluxfire.serve` in containers with a GPU, as many as are asked for, none when nobody asks.

    from fluxfire.deploy.modal_app import make_app
    app = make_app(model="black-forest-labs/FLUX.1-Kontext-dev", snapshot="cpu")

in a file of yours, and `modal deploy FILE` (examples/modal_deploy.py). Two Volumes are shared by all containers: the
weights, which `modal run FILE::app.fetch` brings there without a GPU, and the mega-cache, so that one container
compiles and the others find. A memory snapshot is taken once a deployment; later containers start from it:

- `"cpu"`: with everything imported. The GPU is used for the first time after waking.
- `"gpu"`: with the model on the GPU, ready (alpha at Modal). After waking a picture is compared with the one before,
  and if they differ the model is loaded anew (`host.py`). A waking that fails altogether Modal repeats without it.

Secrets stay in Modal's Secret of the given name and are named here, never read. What is frozen contains them, as the
process does: deploy again after changing one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from typing import Any, Final, Literal

from fluxfire import ArgumentError
from fluxfire.deploy.host import Host
from fluxfire.serve.settings import Settings, read_settings, secret_names

try:
    import modal
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"fluxfire on Modal needs {error.name}: pip install 'fluxfire[modal]'") from None

WEIGHTS: Final = "fluxfire-weights"
MEGACACHE: Final = "fluxfire-megacache"
PORT: Final = 8000
TARGET_CONCURRENCY: Final = 4  # requests a container before another is started: a batch
MAX_CONCURRENCY: Final = 64  # more get 429 from Modal; the server's own queue answers 429 before, and says when to come
IDLE_S: Final = 300  # before a container that nobody asks ends
START_S: Final = 1200  # to load 33 GB from a Volume and compile, once
GRACE_S: Final = 25  # for pictures under way when a container ends; as long as Modal gives one


def make_app(
    name: str = "fluxfire",
    *,
    model: str = "black-forest-labs/FLUX.1-Kontext-dev",
    gpu: str = "H100",
    snapshot: Literal["cpu", "gpu"] | None = "cpu",
    max_containers: int = 10,
    settings: Mapping[str, Any] | None = None,
) -> modal.App:
    """The application, to be deployed by `modal deploy` or `app.deploy()`.

    Args:
        name: of the application, and of the Secret with `FLUXFIRE_API_KEYS`, `HF_TOKEN` and, when pictures are kept in
            R2 or S3, `FLUXFIRE_S3_ACCESS_KEY_ID` and `FLUXFIRE_S3_SECRET_ACCESS_KEY`.
        model: as `fluxfire serve --model` takes it.
        gpu: as Modal names it.
        snapshot: what a container starts from.
        max_containers: most at a time.
        settings: of the server (`fluxfire.serve.settings`), by name; no secrets.

    Raises:
        ArgumentError: a setting is unknown, or a secret; the snapshot is none of the three.
    """
    servers = {None: Server, "cpu": HeldServer, "gpu": WarmServer}
    if snapshot not in servers:
        raise ArgumentError(f"snapshot: found {snapshot!r}, needed 'cpu', 'gpu' or None")
    common: dict[str, Any] = {
        "image": _image(),
        "env": _environment(model, settings or {}),
        "secrets": [modal.Secret.from_name(name, required_keys=_required(settings or {}))],
        "volumes": {
            "/weights": modal.Volume.from_name(WEIGHTS, create_if_missing=True),
            "/megacache": modal.Volume.from_name(MEGACACHE, create_if_missing=True),
        },
        "include_source": False,  # the image has it
    }
    app = modal.App(name)
    app.function(name="fetch", timeout=3600, **common)(fetch)
    app.server(
        name="server",
        gpu=gpu,
        cpu=4,
        memory=65536,  # MiB: the weights pass through it
        port=PORT,
        unauthenticated=True,  # the server asks for its own keys, which OpenAI's clients can send
        target_concurrency=TARGET_CONCURRENCY,
        max_concurrency=MAX_CONCURRENCY,
        max_containers=max_containers,
        scaledown_window=IDLE_S,
        startup_timeout=START_S,
        exit_grace_period=GRACE_S,
        enable_memory_snapshot=snapshot is not None,
        experimental_options={"enable_gpu_snapshot": True} if servers[snapshot] is WarmServer else None,
        **common,
    )(servers[snapshot])
    return app


def fetch() -> str:
    """Brings the weights of the model into the Volume; where they are.

    Raises:
        ArgumentError: the model is made by a function, which knows what it needs.
    """
    settings = read_settings({})
    if settings.model == "embedded" or ":" in settings.model:
        raise ArgumentError(f"model: found {settings.model}, which has nothing to fetch")
    from diffusers import DiffusionPipeline

    token = settings.hf_token.get_secret_value() if settings.hf_token else None
    folder = str(DiffusionPipeline.download(settings.model, token=token))
    _keep(WEIGHTS)
    return folder


class Server:
    """A container without a snapshot."""

    @modal.enter()
    def start(self) -> None:
        """Loads, warms up, listens."""
        self._host = Host(_settings())
        self._host.start()
        _keep(MEGACACHE)

    @modal.exit()
    def stop(self) -> None:
        """Finishes what was taken."""
        self._host.stop()
        _keep(MEGACACHE)


class HeldServer:
    """A container whose snapshot has everything imported."""

    @modal.enter(snap=True)
    def hold(self) -> None:
        """Before the snapshot."""
        self._host = Host(_settings())
        self._host.start(hold=True)

    @modal.enter()
    def let_go(self) -> None:
        """After waking."""
        self._host.let_go()
        _keep(MEGACACHE)

    @modal.exit()
    def stop(self) -> None:
        """Finishes what was taken."""
        self._host.stop()
        _keep(MEGACACHE)


class WarmServer:
    """A container whose snapshot has the model on the GPU."""

    @modal.enter(snap=True)
    def start(self) -> None:
        """Before the snapshot."""
        self._host = Host(_settings())
        self._host.start()
        self._host.remember()
        _keep(MEGACACHE)

    @modal.enter()
    def check(self) -> None:
        """After waking."""
        self._host.check()

    @modal.exit()
    def stop(self) -> None:
        """Finishes what was taken."""
        self._host.stop()
        _keep(MEGACACHE)


def _settings() -> Settings:
    settings = read_settings({})
    if not settings.api_keys:
        raise ArgumentError("FLUXFIRE_API_KEYS is not set: the URL is open to everybody, so the server needs keys")
    return settings


def _keep(volume: str) -> None:
    """Makes what this container has written into a Volume visible to the next ones."""
    if not modal.is_local():
        modal.Volume.from_name(volume).commit()


def _environment(model: str, settings: Mapping[str, Any]) -> dict[str, str | None]:
    if secret := sorted(settings.keys() & secret_names()):
        name = Settings.model_fields[secret[0]].validation_alias or f"FLUXFIRE_{secret[0].upper()}"
        raise ArgumentError(f"{secret[0]} is a secret: put {name} into the Secret of Modal")
    if unknown := sorted(settings.keys() - Settings.model_fields.keys()):
        known = sorted(Settings.model_fields.keys() - secret_names())
        raise ArgumentError(f"settings: found {unknown[0]}, needed one of {', '.join(known)}")
    ours = {
        "model": model,
        "host": "0.0.0.0",
        "port": PORT,
        "device": "cuda",
        "drain_s": GRACE_S - 15,
    }  # what is kept is committed after it
    values = {"storage_dir": "/tmp/pictures"} | ours | dict(settings)
    environment: dict[str, str | None] = {"HF_HOME": "/weights", "XDG_CACHE_HOME": "/megacache"}
    for key, value in values.items():
        environment[f"FLUXFIRE_{key.upper()}"] = value if isinstance(value, str) else json.dumps(value)
    return environment


def _required(settings: Mapping[str, Any]) -> list[str]:
    """What the Secret must have, which Modal checks when the application is deployed."""
    s3 = ["FLUXFIRE_S3_ACCESS_KEY_ID", "FLUXFIRE_S3_SECRET_ACCESS_KEY"] if settings.get("storage") == "s3" else []
    return ["FLUXFIRE_API_KEYS", "HF_TOKEN", *s3]


def _image() -> modal.Image:
    """This fluxfire, with what the server needs in the versions that are installed here."""
    from packaging.requirements import Requirement
    from packaging.version import Version

    lines = [Requirement(line) for line in metadata.requires("fluxfire") or ()]
    extras = ("", "cli", "megacache", "s3", "serve")
    names = {r.name for r in lines if not r.marker or any(r.marker.evaluate({"extra": extra}) for extra in extras)}
    pins = [f"{name}=={Version(metadata.version(name)).public}" for name in sorted(names - {"fluxfire"})]
    return modal.Image.debian_slim().uv_pip_install(*pins).add_local_python_source("fluxfire", ignore=[])
