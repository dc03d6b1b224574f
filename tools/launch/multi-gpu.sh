#!/usr/bin/env bash
# A run on the GPUs of one host. Arguments go to the run:
#
#   tools/launch/multi-gpu.sh --config.steps=100    # one process drives all GPUs, JAX's default
#   PER_PROCESS=1 tools/launch/multi-gpu.sh         # a process for each GPU
#   DEVICES=0,1,2,3 PER_PROCESS=2 tools/launch/multi-gpu.sh
#   DEVICES=cpu PROCESSES=2 PER_PROCESS=4 tools/launch/multi-gpu.sh
#
# When a process fails the others are ended. SIGTERM and Ctrl-C let all of them save.
set -euo pipefail

: "${DEVICES:=all}"     # all, cpu, or numbers of GPUs: 0,1,2,3
: "${PER_PROCESS:=all}" # devices of a process: all, or a number
: "${PROCESSES:=2}"     # where DEVICES=cpu, which counts no devices
: "${PORT:=}"           # of the coordinator; by default one is drawn
: "${EXPERIMENT:=experiments.sciknoweval}"
: "${CONFIG:=configs/sciknoweval.py:chemistry}"
: "${NAME:=sciknoweval}" # of the run, and of its folder in OUTPUT
: "${OUTPUT:=runs}"
: "${PYTHON:=python}"
: "${MAX_RESTARTS:=3}"   # after a failure; see supervise.sh
: "${GRACE:=120}"        # seconds to save in after SIGTERM
: "${FAILURE_GRACE:=10}" # seconds that the others have when a process has failed

launch="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
cd "$launch/../.."
if ((MAX_RESTARTS > 0)); then
  export MAX_RESTARTS
  exec "$launch/supervise.sh" env MAX_RESTARTS=0 "$launch/multi-gpu.sh" "$@"
fi

fail() {
  echo "multi-gpu.sh: $1" >&2
  exit 2
}

# --- which devices each process has ------------------------------------------------------------

groups=() # for each process the value of CUDA_VISIBLE_DEVICES, or "" to leave it alone
if [[ "$DEVICES" == cpu ]]; then
  [[ "$PER_PROCESS" != all ]] || PER_PROCESS=1
  for ((i = 0; i < PROCESSES; i++)); do groups+=(""); done
  export JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$PER_PROCESS"
elif [[ "$DEVICES" == all && "$PER_PROCESS" == all ]]; then
  groups=("")
else
  [[ "$DEVICES" != all ]] ||
    DEVICES="$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd, -)"
  IFS=, read -ra gpus <<<"$DEVICES"
  [[ "$PER_PROCESS" != all ]] || PER_PROCESS=${#gpus[@]}
  ((PER_PROCESS > 0 && ${#gpus[@]} % PER_PROCESS == 0)) ||
    fail "PER_PROCESS: must divide the ${#gpus[@]} GPUs of DEVICES=$DEVICES; got $PER_PROCESS"
  for ((i = 0; i < ${#gpus[@]}; i += PER_PROCESS)); do
    groups+=("$(IFS=, && echo "${gpus[*]:i:PER_PROCESS}")")
  done
fi
count=${#groups[@]}
((count > 0)) || fail "PROCESSES: must be at least 1; got $PROCESSES"
: "${PORT:=$((20000 + RANDOM % 10000))}"

# --- start, watch, end -------------------------------------------------------------------------

# A process group of its own for each process: Ctrl-C reaches it through this script alone, once.
set -m
alive=() # process id of each process that has not ended, by its number
failure=0
deadline=0 # in SECONDS of this script, 0 for none

# Asks all to end, and sees to it that they have ended after $1 seconds.
end_all() {
  local end=$((SECONDS + $1))
  ((deadline != 0 && deadline < end)) || deadline=$end
  for pid in "${alive[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
}

trap 'end_all "$GRACE"' TERM INT

for ((i = 0; i < count; i++)); do
  several=()
  ((count == 1)) ||
    several=(--coordinator "127.0.0.1:$PORT" --num-processes "$count" --process-id "$i")
  visible=()
  [[ -z "${groups[i]}" ]] || visible=("CUDA_VISIBLE_DEVICES=${groups[i]}")
  env "${visible[@]}" "$PYTHON" -u -m "$EXPERIMENT" --config "$CONFIG" --name "$NAME" \
    --config.output="$OUTPUT" --resume-if-saved "${several[@]}" "$@" &
  alive[i]=$!
  ((deadline == 0)) || kill -TERM "$!" 2>/dev/null || true # told to stop while starting
done

while ((${#alive[@]} > 0)); do
  for i in "${!alive[@]}"; do
    ! kill -0 "${alive[i]}" 2>/dev/null || continue
    code=0
    wait "${alive[i]}" || code=$?
    unset "alive[i]"
    if ((code != 0 && failure == 0)); then
      failure=$code
      echo "multi-gpu.sh: process $i of $count ended with exit code $code; ending the others" >&2
      end_all "$FAILURE_GRACE"
    fi
  done
  if ((deadline != 0 && SECONDS >= deadline)); then
    for pid in "${alive[@]}"; do kill -KILL -- "-$pid" 2>/dev/null || true; done
  fi
  sleep 0.2 &
  wait "$!" || true
done
exit "$failure"
