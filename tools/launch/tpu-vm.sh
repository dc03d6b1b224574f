#!/usr/bin/env bash
# A run on a Cloud TPU slice, one process on each of its VMs:
#
#   tools/launch/tpu-vm.sh create
#   tools/launch/tpu-vm.sh setup                       # again after every change of the code
#   tools/launch/tpu-vm.sh run --config.steps=100      # further arguments go to the run
#   tools/launch/tpu-vm.sh logs | status | stop | delete
#
# `run` returns at once. A process that fails is started again on its VM; the others, which notice
# and fail too, meet it there.
set -euo pipefail

: "${TPU:=pmd-jax}"              # name of the slice
: "${ZONE:=us-east1-d}"
: "${PROJECT:=}"                 # by default that of gcloud's configuration
: "${TYPE:=v6e-16}"              # v6e-16, v5p-32, v5litepod-16, ...
: "${VERSION:=v2-alpha-tpuv6e}"  # v2-alpha-tpuv5 for v5p, v2-alpha-tpuv5-lite for v5e
: "${SPOT:=no}"                  # yes: cheaper, and may be taken away
: "${NFS:=}"                     # host:/share to mount at OUTPUT, such as a Filestore instance
: "${OUTPUT:=/mnt/runs}"         # must be the same files on all VMs
: "${EXPERIMENT:=experiments.sciknoweval}"
: "${CONFIG:=configs/sciknoweval.py:chemistry}"
: "${NAME:=sciknoweval}"         # of the run, and of its folder in OUTPUT
: "${PYTHON_VERSION:=3.11}"
: "${MAX_RESTARTS:=20}"          # on each VM; see supervise.sh
: "${GRACE:=120}"                # seconds to save in when it is stopped
: "${REMOTE:=pmd_jax}"           # folder in the home of each VM

usage="usage: tpu-vm.sh create|setup|run|logs|status|stop|delete [arguments of the run]"
command="${1:-}"
shift || true
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

tpu() {
  local verb="$1"
  shift
  gcloud compute tpus tpu-vm "$verb" "$@" --zone="$ZONE" ${PROJECT:+--project="$PROJECT"}
}

# Runs a command on worker $1 (or all), in the folder of the code.
on() { tpu ssh "$TPU" --worker="$1" --command="mkdir -p $REMOTE && cd $REMOTE || exit; $2"; }

create() {
  local spot=''
  [[ "$SPOT" != yes ]] || spot=--spot
  tpu create "$TPU" --accelerator-type="$TYPE" --version="$VERSION" ${spot:+"$spot"}
}

setup() {
  local archive
  archive="$(mktemp -d)/code.tgz"
  git ls-files -z | tar --null -T - -czf "$archive"
  tpu scp "$archive" "$TPU:pmd_jax.tgz" --worker=all
  rm -f "$archive"
  on all "tar -xzf ~/pmd_jax.tgz && python3 -m pip install --user --quiet uv &&
    { [ -x .venv/bin/python ] || python3 -m uv venv --python $PYTHON_VERSION .venv; } &&
    python3 -m uv pip install --quiet --python .venv/bin/python -r requirements.txt 'jax[tpu]'"
  if [[ -n "$NFS" ]]; then
    on all "sudo apt-get install -y -qq nfs-common && sudo mkdir -p $OUTPUT &&
      { mountpoint -q $OUTPUT || sudo mount -t nfs $NFS $OUTPUT; } && sudo chmod 1777 $OUTPUT"
  fi
}

run() {
  local words
  words="$(printf '%q ' .venv/bin/python -u -m "$EXPERIMENT" --config "$CONFIG" --name "$NAME" \
    --config.output="$OUTPUT" --multihost --resume-if-saved "$@")"
  on all "if [ -f run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; then
      echo 'a run is going on here; stop it first' >&2; exit 1; fi
    MAX_RESTARTS=$MAX_RESTARTS nohup setsid bash tools/launch/supervise.sh $words \
      >>run.log 2>&1 </dev/null & echo \$! >run.pid"
}

stop() {
  on all "[ -f run.pid ] && pid=\$(cat run.pid) && kill -TERM \$pid 2>/dev/null || exit 0
    for second in \$(seq $GRACE); do kill -0 \$pid 2>/dev/null || exit 0; sleep 1; done
    echo 'killed: it did not end in $GRACE s' >&2; pkill -KILL --session \$pid"
}

status() {
  on all "if [ -f run.pid ] && kill -0 \$(cat run.pid) 2>/dev/null; then
    echo \$(hostname): running; else echo \$(hostname): not running; tail -n 3 run.log; fi"
}

case "$command" in
  create | setup | stop | status) "$command" ;;
  run) run "$@" ;;
  logs) on 0 "tail -n 100 -F run.log" ;;
  delete) tpu delete "$TPU" --quiet ;;
  *)
    echo "$usage; got '$command'" >&2
    exit 2
    ;;
esac
