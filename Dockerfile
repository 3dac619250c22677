# Secateur on the CPU: dependencies, then the source, then the demo's children, cut as `make serve` cuts them.
#
#   docker build -t secateur:dev .
#   docker run --rm -p 127.0.0.1:8000:8000 secateur:dev
#
# Wheels at hand, such as a CPU-only torch, save downloads: docker build --build-context wheels=FOLDER -t secateur:dev .
ARG PYTHON=3.12

# Empty unless the caller supplies a folder of that name.
FROM scratch AS wheels

FROM python:${PYTHON}-slim-bookworm

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /srv/secateur

# The dependencies change less often than the source, so they have a layer of their own, made from their list alone.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=bind,from=wheels,target=/wheels \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > /tmp/requirements.txt \
    && pip install --no-cache-dir --find-links /wheels -c constraints.txt -r /tmp/requirements.txt \
    && rm /tmp/requirements.txt

COPY kernels kernels
COPY models models
COPY service service
COPY demo demo
COPY LICENSE ./
ENV PYTHONPATH=/srv/secateur
# Weight files may be readable by their writer only, who is root here and not who serves.
RUN python -m compileall -q kernels models service && python -m service demo path && chmod -R a+rX demo

USER 10001:10001
# All interfaces of the container; who reaches the port is decided where it is published.
ENV SECATEUR_SERVER__HOST=0.0.0.0 SECATEUR_AUTH__MODE=open
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
CMD ["python", "-m", "service", "serve"]
