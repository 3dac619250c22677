#!/usr/bin/env bash
# Builds the image and brings compose up for real: an answer, a user that is not root, a clean stop. Run it by
# `make test-containers`. WHEELS names a folder of wheels to install from, PYTHON the Python line of the image.
set -euo pipefail
cd "$(dirname "$0")/.."
export SECATEUR_PORT= # empty: the engine picks a free port

compose() { docker compose -p secateur-check "$@"; }
finish() {
  status=$?
  if [[ $status != 0 ]]; then compose logs --tail 30 >&2; fi
  compose down --volumes --timeout 20
  exit "$status"
}
trap finish EXIT

docker build ${WHEELS:+--build-context wheels="$WHEELS"} --build-arg PYTHON="${PYTHON:-3.12}" --tag secateur:dev .
compose up --detach --no-build --pull never --wait --wait-timeout 120
at=$(compose port secateur 8000)

answer=$(curl --silent --fail-with-body --max-time 10 "http://$at/classify" \
  --header 'content-type: application/json' --data '{"task": "language", "inputs": "Der Eintrag wurde gespeichert."}')
echo "$answer"
[[ $answer == *'"label":"de"'* ]]
[[ $(compose exec -T secateur id -u) == 10001 ]]
compose exec -T secateur python -c 'import importlib.util as u; assert not u.find_spec("pytest")'
compose exec -T secateur sh -c '! touch /srv/secateur/probe 2>/dev/null && ! test -e /srv/secateur/tests'

container=$(compose ps --quiet secateur)
compose stop
[[ $(docker inspect --format '{{.State.ExitCode}}' "$container") == 0 ]]
echo "containers: answered, not root, stopped with 0"
