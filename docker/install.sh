#!/bin/sh
# Installs the dependencies into /opt/venv, without pip and without what only serves developers. Runs inside the build:
# DEVICE is cpu or cuda, TORCH_LINKS a page that links to wheels of torch, if known; /wheels may hold them.
set -eu

if [ "$DEVICE" = cpu ] && ! ls /wheels/torch-*.whl >/dev/null 2>&1; then
  if [ -n "$TORCH_LINKS" ]; then
    set -- --find-links "$TORCH_LINKS"
  else
    echo "WARNING: no TORCH_LINKS and no wheel of torch: its default build brings gigabytes of CUDA libraries" >&2
  fi
fi
python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
  >/tmp/requirements.txt
python -m venv --without-pip /opt/venv
pip --python /opt/venv/bin/python --disable-pip-version-check install --no-cache-dir --no-compile \
  --find-links /wheels "$@" --constraint constraints.txt --requirement /tmp/requirements.txt
rm /tmp/requirements.txt

# Headers, test programs, tests and, for a CPU, symbol tables: 380 MB. torch_shm_manager stays, torch looks for it at
# import. Libraries in folders called *.libs were rewritten by their packagers, and `strip` may break them.
cd /opt/venv/lib/python3*/site-packages
rm -rf torch/include torch/test torch/share torch/lib/lib*test*.so torch/lib/libbackend_with_compiler.so
find torch/bin -type f ! -name torch_shm_manager -delete
find . -type d -name tests -prune -exec rm -rf {} +
if [ "$DEVICE" = cpu ]; then find . -name '*.so*' -type f ! -path '*.libs/*' -exec strip --strip-unneeded {} +; fi

# Bytecode of what a start imports, and of nothing else: the root file system is read-only later.
python -c "import alembic.command, fastapi, numpy, PIL.Image, prometheus_client, psycopg, pydantic, rich.console, \
safetensors.torch, scipy.stats, sqlalchemy.dialects.postgresql, sqlalchemy.dialects.sqlite, tokenizers, torch, typer, \
uvicorn.protocols.http.httptools_impl, uvloop, yaml"
