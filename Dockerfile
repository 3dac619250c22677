# Secateur in a container: dependencies, the demo's models, and an image of what serves, each in a stage of its own.
#
#   docker build --tag secateur:dev .                                              for a CPU
#   docker build --tag secateur:dev-cuda --build-arg DEVICE=cuda .                 for an NVIDIA GPU
#   docker build --tag secateur:dev --build-context wheels=FOLDER .                with wheels at hand, such as torch
#   docker run --rm --publish 127.0.0.1:8000:8000 secateur:dev
ARG PYTHON=3.12
ARG DEVICE=cpu

# Empty unless the caller supplies a folder of that name.
FROM scratch AS wheels

FROM python:${PYTHON}-slim-bookworm AS base
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /srv/secateur

# Made from the list of dependencies alone, which changes less often than the source.
FROM base AS dependencies
ARG DEVICE
# A page or folder with links to wheels of torch built for CPUs. Without one, and without a wheel at hand, the default
# build is installed, which brings gigabytes of CUDA libraries along.
ARG TORCH_LINKS=
# For `strip`; nothing of it reaches the image that serves.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends binutils \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml constraints.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    --mount=type=bind,source=docker/install.sh,target=/install.sh \
    sh /install.sh

# The children are cut as `make serve` cuts them, so that the first start serves at once.
FROM dependencies AS models
COPY kernels kernels
COPY models models
COPY service service
COPY demo demo
COPY LICENSE ./
# Weight files may be readable by their writer only, who is root here and not who serves.
RUN python -m compileall -q kernels models service && python -m service demo path && chmod -R a+rX demo

FROM base AS runtime-cpu

# Triton compiles a launcher in C for each of its kernels when it is first needed: a compiler, and a folder for the
# results, from which they are loaded.
FROM base AS runtime-cuda
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && install --directory --owner 10001 --group 10001 /var/cache/triton
ENV TRITON_CACHE_DIR=/var/cache/triton

# hadolint ignore=DL3006
FROM runtime-${DEVICE}
COPY --from=dependencies /opt/venv /opt/venv
# Volumes that are mounted here take over the owner, who serves: records of experiments, models and keys.
RUN install --directory --owner 10001 --group 10001 /var/lib/secateur /models /keys
COPY --from=models /srv/secateur /srv/secateur
ENV PYTHONPATH=/srv/secateur PYTHONDONTWRITEBYTECODE=1

USER 10001:10001
# All interfaces of the container; who reaches the port is decided where it is published.
ENV SECATEUR_SERVER__HOST=0.0.0.0 \
    SECATEUR_AUTH__MODE=open \
    SECATEUR_STORAGE__URL=sqlite:////var/lib/secateur/secateur.db
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
CMD ["python", "-m", "service", "serve"]
# Last, since they differ with every commit.
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Secateur" \
      org.opencontainers.image.description="Serves full and pruned Mixture-of-Experts classifiers side by side" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
