#!/usr/bin/env bash
# The docker tests with an engine of their own: brings one up where that can be done, runs `pytest -m "docker and not slow"`
# where its published ports are, takes it down again. Says why and ends well where no engine is to be had. Needs git, make, pip.
#
#   PY              the interpreter with everything installed
#   WEFT_ENGINE_UP  a script that brings an engine up (`up`, `env`, `exec CMD`), with engine-down.sh beside it
#
# An engine that answers already is used as it is, and left as it is.
set -uo pipefail
cd "$(dirname "$0")/../.."
PY=${PY:-.venv/bin/python}
LIMIT_S=1800
UP=${WEFT_ENGINE_UP:-../shared/docker/engine-up.sh}
LOG=.weft/docker-lane.log
BASE=python:3.11-slim-bookworm
mkdir -p .weft
say() { printf 'docker lane: %s\n' "$*"; }
not_run() { say "not run: $*"; exit 0; }
answers() { timeout 30 docker version >/dev/null 2>&1 && timeout 30 docker compose version >/dev/null 2>&1; }

# What a run that was cut off has left; of the lane's own engine also more build cache than the next run can use.
tidy() {
  docker ps -aq --filter name=weft-test | xargs -r docker rm -fv
  docker network ls -q --filter name=weft-test | xargs -r docker network rm
  docker volume ls -q --filter name=weft-test | xargs -r docker volume rm -f
  docker images -q --filter 'reference=weft-test/*' | sort -u | xargs -r docker image rm -f
  [ ${#WHERE[@]} -eq 0 ] || docker builder prune --force --keep-storage 6GB
} >/dev/null 2>&1

WHERE=()
if [ -x "$UP" ] && ! "$UP" exec true 2>/dev/null && ! answers; then
  [ "$(id -u)" = 0 ] || not_run "no Docker engine answers, and only root can bring one up"
  begin=$SECONDS
  trap '"$(dirname "$UP")/engine-down.sh"' EXIT
  trap 'exit 130' INT TERM
  timeout 900 "$UP" >"$LOG" 2>&1 || not_run "no engine came up: $(tail -1 "$LOG")"
  say "engine up after $((SECONDS - begin)) s"
fi
if [ -x "$UP" ] && "$UP" exec true 2>/dev/null; then
  eval "$("$UP" env)"
  WHERE=("$UP" exec)
fi
answers || not_run "no Docker engine with compose answers"
docker image inspect "$BASE" >/dev/null 2>&1 || timeout 300 docker pull --quiet "$BASE" >"$LOG" 2>&1 ||
  not_run "no image $BASE: $(tail -1 "$LOG")"

# Outside of the engine's network, where the package index surely is.
ls docker/wheels/torch-2.13.0*.whl >/dev/null 2>&1 ||
  "$PY" -m pip download --quiet --no-deps torch==2.13.0 -d docker/wheels || not_run "no wheel of torch for the images"

begin=$SECONDS
# The files that have the marker: to collect the others takes a minute.
mapfile -t FILES < <(grep -rl --include='test_*.py' 'mark\.docker' tests | sort)
"${WHERE[@]}" timeout --kill-after=30 "$LIMIT_S" "$PY" -m pytest -m "docker and not slow" -v --durations=10 "${FILES[@]}" 2>&1 | tee "$LOG"
code=${PIPESTATUS[0]}
tidy
# Whatever a test skips for was looked at above.
if [ "$code" = 0 ] && ! grep -q ' PASSED' "$LOG"; then say "every test was skipped"; code=1; fi
[ "$code" != 124 ] || say "cut off after $LIMIT_S s"
say "ended after $((SECONDS - begin)) s with $code; the log is $LOG"
exit "$code"
