#!/usr/bin/env bash
# A run on TPU slices of a GKE cluster that xpk made. Arguments go to the run:
#
#   CLUSTER=my-cluster IMAGE=REGION-docker.pkg.dev/PROJECT/REPO/pmd_jax:1 tools/launch/gke-xpk.sh
#
# A volume for the run folder has to be attached to the cluster once; see README.md.
set -euo pipefail

: "${CLUSTER:?must name the cluster, as in: CLUSTER=my-cluster $0}"
: "${IMAGE:?must name an image of tools/launch/Dockerfile, as in: IMAGE=REGISTRY/pmd_jax:1 $0}"
: "${PROJECT:=}"          # by default that of gcloud's configuration, as the zone
: "${ZONE:=}"
: "${TPU_TYPE:=v6e-16}"   # v6e-16, v5p-32, v5litepod-16, ...
: "${NUM_SLICES:=1}"
: "${EXPERIMENT:=experiments.sciknoweval}"
: "${CONFIG:=configs/sciknoweval.py:chemistry}"
: "${NAME:=sciknoweval}"  # of the run, and of its folder in OUTPUT
: "${WORKLOAD:=$NAME}"    # xpk refuses a name that it has
: "${OUTPUT:=/runs}"      # where the shared volume is mounted
: "${MAX_RESTARTS:=20}"
: "${GRACE:=120}"         # seconds to save in after SIGTERM

run="$(printf '%q ' python -u -m "$EXPERIMENT" --config "$CONFIG" --name "$NAME" \
  --config.output="$OUTPUT" --multihost --resume-if-saved "$@")"

# xpk restarts on exit code 42 and 127 to 255 by itself, on 1 when asked; 2, bad input, is final.
# 143: a pod that was told to stop must not count as done. exec: so that SIGTERM gets there.
exec xpk workload create \
  --cluster="$CLUSTER" ${PROJECT:+--project="$PROJECT"} ${ZONE:+--zone="$ZONE"} \
  --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="$NUM_SLICES" \
  --docker-image="$IMAGE" --max-restarts="$MAX_RESTARTS" --restart-on-exit-codes=1 \
  --termination-grace-period-seconds="$GRACE" \
  --command="cd /app && exec env STOPPED_CODE=143 bash tools/launch/supervise.sh $run"
