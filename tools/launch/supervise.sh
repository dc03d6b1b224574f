#!/usr/bin/env bash
# Keeps one command going: starts it again when it fails, and passes SIGTERM on so that it saves.
#
#   MAX_RESTARTS=9 tools/launch/supervise.sh python -m experiments.sciknoweval --resume-if-saved ...
#
# The exit code is the command's last. Code 2 is final: the same command would fail again.
set -euo pipefail

: "${MAX_RESTARTS:=0}"  # how often a failed command is started again
: "${RESTART_WAIT:=10}" # seconds before each of these
: "${STOPPED_CODE:=0}"  # exit code of a command that was told to stop, saved and left with 0

if (($# == 0)); then
  echo "supervise.sh: needs a command, such as: supervise.sh python -m experiments.sciknoweval" >&2
  exit 2
fi

# A process group of its own for each command: Ctrl-C reaches it through this script alone, once.
set -m

stopping='' interrupted=''
stop() {
  stopping=yes interrupted=yes
  kill -TERM "$!" 2>/dev/null || true
}

# Ends what was just started where the signal came before it.
too_late() {
  [[ -z "$stopping" ]] || kill -TERM "$!" 2>/dev/null || true
}

# Waits for process $1 whatever signals come, and sets `code`.
await() {
  interrupted='' code=0
  wait "$1" || code=$?
  while [[ -n "$interrupted" ]]; do
    interrupted=''
    local again=0
    wait "$1" 2>/dev/null || again=$?
    [[ "$again" == 127 ]] || code=$again # 127: it was over already
  done
}

true & # so that there is a $! when a signal comes early
wait "$!"
trap stop TERM INT
last=$STOPPED_CODE
for ((attempt = 0; ; attempt++)); do
  [[ -z "$stopping" ]] || exit "$last"
  "$@" &
  too_late
  await "$!"
  if [[ -n "$stopping" ]]; then
    exit "$((code == 0 ? STOPPED_CODE : code))"
  fi
  if ((code == 0 || code == 2 || attempt >= MAX_RESTARTS)); then
    exit "$code"
  fi
  echo "supervise.sh: exit code $code; restart $((attempt + 1)) of $MAX_RESTARTS" \
    "in $RESTART_WAIT s" >&2
  last=$code
  sleep "$RESTART_WAIT" &
  too_late
  await "$!"
done
