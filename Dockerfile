# Two images out of one file:
#
#   docker build -t knowledge-engine .                                  everything: server, gateway, engine, training
#   docker build -t knowledge-engine:cpu --build-arg ACCELERATOR=cpu .  the same without what only a GPU uses
#   docker build -t knowledge-engine:slim --target slim .               server and gateway alone, without torch
#
# They listen on every address of their container, so they start only with KNOWLEDGE_API_KEYS or, said out loud,
# KNOWLEDGE_ALLOW_ANONYMOUS=true:
#
#   docker run -p 50051:50051 -p 8001:8001 -e KNOWLEDGE_API_KEYS=shop:CHANGE-ME -v knowledge:/var/lib/knowledge-engine \
#     knowledge-engine
#   docker run --gpus all -p 50051:50051 -p 8001:8001 -e KNOWLEDGE_API_KEYS=shop:CHANGE-ME \
#     -v knowledge:/var/lib/knowledge-engine knowledge-engine
#
# One part alone: -e KNOWLEDGE_ONLY=server, gateway or engine; the health check then asks that part. The slim image is
# the server unless told otherwise. Give a stop time to drain: --stop-timeout 45.

# The torch wheel of PyPI cannot be imported without its CUDA libraries, so every full image can use a GPU and none gets
# small. `cpu` leaves out what torch loads on a GPU alone (1 GB of 5: triton, cuSOLVER, the CUDA bindings) and hides GPUs.
ARG ACCELERATOR=gpu

# The version the lock files were made with.
FROM ghcr.io/astral-sh/uv:0.13.9 AS uv


FROM python:3.11-slim-bookworm AS build
COPY --from=uv /uv /usr/local/bin/uv
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_PYTHON_DOWNLOADS=never \
    VIRTUAL_ENV=/opt/knowledge-engine
WORKDIR /src
RUN uv venv "$VIRTUAL_ENV"


FROM build AS packages-slim
COPY requirements-slim.lock ./
RUN --mount=type=cache,target=/root/.cache/uv uv pip sync --require-hashes requirements-slim.lock
COPY pyproject.toml README.md ./
COPY src src
COPY gateway gateway
RUN --mount=type=cache,target=/root/.cache/uv uv pip install --no-deps .


FROM build AS packages-gpu
COPY requirements.lock ./
RUN --mount=type=cache,target=/root/.cache/uv uv pip sync --require-hashes requirements.lock
COPY pyproject.toml README.md ./
COPY src src
COPY gateway gateway
RUN --mount=type=cache,target=/root/.cache/uv uv pip install --no-deps .


FROM packages-gpu AS packages-cpu
RUN uv pip uninstall triton nvidia-cusolver nvidia-nvtx cuda-bindings cuda-pathfinder cuda-toolkit


# hadolint ignore=DL3006
FROM packages-${ACCELERATOR} AS packages


FROM python:3.11-slim-bookworm AS runtime
# As process 1, tini passes signals on and reaps what a crashed server leaves behind.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends tini=0.19.0-* \
    && rm -rf /var/lib/apt/lists/*
# Named, as some libraries ask who they run as; the data folder is its home, so that caches land in the volume.
RUN useradd --uid 10001 --user-group --no-log-init --no-create-home --home-dir /var/lib/knowledge-engine \
        --shell /usr/sbin/nologin knowledge \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/knowledge-engine
ENV PATH=/opt/knowledge-engine/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HOME=/var/lib/knowledge-engine \
    KNOWLEDGE_DATA_DIR=/var/lib/knowledge-engine \
    KNOWLEDGE_GRPC_ADDRESS=0.0.0.0:50051 \
    KNOWLEDGE_HTTP_ADDRESS=0.0.0.0:8001
# config/.env is looked for here, should someone mount one.
WORKDIR /app
VOLUME ["/var/lib/knowledge-engine"]
EXPOSE 50051 8001
USER 10001:10001
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s CMD ["knowledge-engine", "health", "--local"]
ENTRYPOINT ["tini", "--", "knowledge-engine"]
CMD ["serve"]


FROM runtime AS slim
ENV KNOWLEDGE_ONLY=server
COPY --from=packages-slim /opt/knowledge-engine /opt/knowledge-engine


FROM runtime AS runtime-gpu
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility


FROM runtime AS runtime-cpu
ENV CUDA_VISIBLE_DEVICES=""


# hadolint ignore=DL3006
FROM runtime-${ACCELERATOR} AS full
COPY --from=packages /opt/knowledge-engine /opt/knowledge-engine
