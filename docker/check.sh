#!/usr/bin/env bash
# Builds the image and brings compose up for real: answers, numbers in Prometheus, a kill under load, keys, a stop under
# load. Run it by `make test-containers`. WHEELS names a folder of wheels to install from, PYTHON the Python line of the
# image, VENV the environment with the dev extra, PICTURE a file for the dashboard drawn from minutes of traffic. What
# needs no engine is checked first, and alone where there is none.
set -euo pipefail
trap 'echo "containers: line $LINENO failed" >&2' ERR
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
prometheus_image=prom/prometheus:v2.53.3
spare_bytes=250000000
# Empty: the engine picks free ports.
export SECATEUR_PORT="" PROMETHEUS_PORT=""
# Small models, on a machine that runs the clients too.
export SECATEUR_THREADS=1

say() { printf '\n== containers: %s (%s s)\n' "$1" "$SECONDS"; }
die() {
  printf 'containers: %s\n' "$1" >&2
  exit 1
}

say "what needs no engine: hadolint, shellcheck, compose config, rules, dashboard"
"$venv/bin/python" -m pytest -q tests/docker tests/service/test_dashboard.py

if ! docker version >/dev/null 2>&1; then
  printf '\n%s\n' \
    "!!!!!!!! NO CONTAINER ENGINE ANSWERS HERE !!!!!!!!" \
    "The image was NOT built, compose was NOT brought up, nothing was killed or stopped." \
    "Only what is listed above was checked." >&2
  exit 0
fi

files=(--file compose.yaml)
notes=$(mktemp -d)
compose() { docker compose --project-name secateur-check "${files[@]}" "$@"; }
check() { python3 docker/check.py "$@"; }
# The address changes when a container starts again.
service() { compose port secateur 8000; }
status_of() { docker inspect --format "$1" "$(compose ps --all --quiet secateur)"; }
wait_until_healthy() {
  for _ in $(seq 1 120); do
    if [[ $(status_of '{{.State.Health.Status}}') == healthy ]]; then return; fi
    sleep 0.5
  done
  die "not healthy after a minute"
}
finish() {
  status=$?
  jobs -p | xargs --no-run-if-empty kill 2>/dev/null || true
  if [[ $status != 0 ]]; then compose logs --tail 30 >&2; fi
  compose down --volumes --timeout 20
  rm -rf "$notes"
  left=$(docker ps --all --quiet --filter label=com.docker.compose.project=secateur-check;
    docker volume ls --quiet --filter label=com.docker.compose.project=secateur-check;
    docker network ls --quiet --filter label=com.docker.compose.project=secateur-check)
  if [[ -n $left ]]; then die "left behind: $left"; fi
  exit "$status"
}
trap finish EXIT

say "build"
docker build ${WHEELS:+--build-context wheels="$WHEELS"} --build-arg PYTHON="${PYTHON:-3.12}" \
  --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" --tag secateur:dev .

say "image"
size=$(docker image inspect --format '{{.Size}}' secateur:dev)
# What the wheel says it installs; some of it is deleted again.
torch=$(docker run --rm secateur:dev sh -c 'cat /opt/venv/lib/python3*/site-packages/torch-*.dist-info/RECORD' |
  awk -F, '{sum += $NF} END {printf "%d", sum}')
echo "image: $((size / 1000000)) MB, of which torch's wheel would be $((torch / 1000000)) MB and all else is $(((size - torch) / 1000000)) MB"
if ((size - torch >= spare_bytes)); then die "the image is larger than torch's wheel and $((spare_bytes / 1000000)) MB"; fi
[[ $(docker image inspect --format '{{.Config.User}}' secateur:dev) == 10001:10001 ]]
[[ $(docker image inspect --format '{{index .Config.Labels "org.opencontainers.image.title"}}' secateur:dev) == Secateur ]]
docker run --rm --entrypoint sh secateur:dev -c '
  set -e
  for tool in gcc cc ld strip make git curl; do if command -v $tool; then exit 1; fi; done
  python -c "import importlib.util as u; assert not any(map(u.find_spec, (\"pytest\", \"mypy\", \"pip\", \"triton\")))"
  test ! -e tests && test ! -e .git && test ! -e demo/data && test -z "$(ls -A /tmp)"'

say "Prometheus' files, by its own tool"
promtool() {
  docker run --rm --volume "$PWD/docker/prometheus:/etc/prometheus:ro" --workdir /etc/prometheus \
    --entrypoint promtool "$prometheus_image" "$@"
}
promtool check config prometheus.yml
promtool check config --syntax-only prometheus.keys.yml
promtool test rules rules_test.yml

say "up"
compose up --detach --no-build --pull never --wait --wait-timeout 120
[[ $(compose exec -T secateur id -u) == 10001 && $(compose exec -T secateur id -g) == 10001 ]]
for folder in / /srv/secateur /opt/venv /models; do
  if compose exec -T secateur touch "$folder/probe" 2>/dev/null; then die "$folder can be written to"; fi
done
[[ $(status_of '{{.HostConfig.ReadonlyRootfs}} {{.HostConfig.Memory}}') == "true $((2 * 1024 ** 3))" ]]

say "answers"
check answers "$(service)"

say "numbers"
check traffic "$(service)" "$notes/traffic.json"
check numbers "$(service)" "$(compose port prometheus 9090)" "$notes/traffic.json"

if [[ -n ${PICTURE:-} ]]; then
  say "picture"
  check busy "$(service)" 300
  "$venv/bin/python" -m benchmarks.dashboard --prometheus "http://$(compose port prometheus 9090)" --out "$PICTURE" --minutes 5
fi

say "kill under load"
check load "$(service)" "$notes/kill.json" &
load=$!
sleep 3
check label "$(service)" "$notes/held.json"
compose exec -T secateur python -c '
import os, pathlib
os.kill(int(pathlib.Path("/proc/1/task/1/children").read_text().split()[0]), 9)' || true
wait "$load"
wait_until_healthy
[[ $(status_of '{{.RestartCount}}') == 1 ]] || die "the service did not come back by itself"
check recall "$(service)" "$notes/held.json"
check answers "$(service)" >/dev/null

say "keys"
files+=(--file docker/compose.keys.yaml)
export SECATEUR_METRICS_KEY_FILE=$notes/metrics.key
key() { compose run --rm --no-TTY keys new "$1" --keys-file /keys/keys.txt --scope "$2"; }
key prometheus metrics >"$notes/metrics.key"
# Prometheus is another user than the one who wrote it.
chmod 755 "$notes" && chmod 644 "$notes/metrics.key"
caller=$(key caller classify)
compose up --detach --no-build --pull never --wait --wait-timeout 120
check keys "$(service)" "$(compose port prometheus 9090)" "$caller"
successor=$(key successor classify)
compose run --rm --no-TTY keys remove caller --keys-file /keys/keys.txt
compose kill --signal HUP secateur
sleep 1
check refused "$(service)" "$caller"
# The volume is the same one.
SECATEUR_KEY=$successor check recall "$(service)" "$notes/held.json"

say "stop under load"
SECATEUR_KEY=$successor check load "$(service)" "$notes/stop.json" &
load=$!
sleep 3
container=$(compose ps --quiet secateur)
compose stop secateur
[[ $(docker inspect --format '{{.State.ExitCode}}' "$container") == 0 ]] || die "the stop did not end with 0"
wait "$load"
docker logs "$container" >"$notes/log" 2>&1
check drained "$notes/stop.json" "$notes/log"

say "replicas"
SECATEUR_HASH_KEY=$(head -c 32 /dev/urandom | od -An -tx1 | tr -d ' \n')
export SECATEUR_HASH_KEY
missing=()
for image in $(docker compose --file compose.yaml --file docker/compose.replicas.yaml config --images); do
  docker image inspect "$image" >/dev/null 2>&1 || missing+=("$image")
done
if [[ ${#missing[@]} != 0 ]]; then
  printf '\n%s\n' "!!!!!!!! REPLICAS WERE NOT BROUGHT UP: ${missing[*]} not here !!!!!!!!" "Their configuration was checked." >&2
else
  compose down --volumes --timeout 20
  files=(--file compose.yaml --file docker/compose.replicas.yaml)
  balancer() { compose port balancer 8000; }
  compose up --detach --no-build --pull never --wait --wait-timeout 180
  check answers "$(balancer)"
  check label "$(balancer)" "$notes/shared.json"
  check load "$(balancer)" "$notes/replicas.json" 20 &
  load=$!
  sleep 3
  one=$(compose ps --quiet secateur | head -n 1)
  docker stop "$one"
  [[ $(docker inspect --format '{{.State.ExitCode}}' "$one") == 0 ]]
  wait "$load"
  check steady "$notes/replicas.json"
  # By the replica that is left.
  check recall "$(balancer)" "$notes/shared.json"
fi
say "all passed"
