# fluxfire serve on a GPU. torch brings CUDA's libraries; of the host it needs the driver and NVIDIA's container toolkit.
#
#     docker build -t fluxfire . && docker run --gpus all --env-file .env -p 127.0.0.1:8000:8000 fluxfire
FROM python:3.12-slim-bookworm

# torch.compile writes C and compiles it.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --no-install-recommends --yes gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 fluxfire

WORKDIR /app
# Dependencies first: a change of the source installs none of them anew.
COPY pyproject.toml README.md LICENSE NOTICE scripts/constraints.txt ./
RUN mkdir -p src/fluxfire \
    && printf '__version__ = "0"\n' > src/fluxfire/__init__.py \
    && pip install --no-cache-dir --constraint constraints.txt '.[serve,s3]'
COPY src src
RUN pip install --no-cache-dir --no-deps --force-reinstall .

USER 1000
WORKDIR /home/fluxfire
# Weights and compiled graphs, kept in a volume; pictures by URL beside them.
RUN mkdir -p .cache pictures
ENV FLUXFIRE_HOST=0.0.0.0 \
    TORCHINDUCTOR_CACHE_DIR=/home/fluxfire/.cache/inductor \
    TRITON_CACHE_DIR=/home/fluxfire/.cache/triton \
    FLUXFIRE_STORAGE_DIR=/home/fluxfire/pictures \
    PYTHONUNBUFFERED=1
VOLUME ["/home/fluxfire/.cache"]
EXPOSE 8000
# Alive, not ready: loading the weights takes minutes, and a container that loads must not be replaced.
HEALTHCHECK --interval=15s --timeout=5s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=4)"]
STOPSIGNAL SIGTERM
CMD ["fluxfire", "serve"]
