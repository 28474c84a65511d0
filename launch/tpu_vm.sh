#!/usr/bin/env bash
# A run on a TPU slice: asks for it, installs, trains on every host, and begins anew after a preemption.
# Written from the public documentation of gcloud and of JAX; not run by us.
#
#   PROJECT=... ZONE=us-east5-a NAME=pgpo TYPE=v5p-128 VERSION=v2-alpha-tpuv5 \
#   SOURCE=https://HOST/pgpo_jax.git launch/tpu_vm.sh tpu_pod --checkpoint.path gs://BUCKET/RUN
#
# The arguments are those of `pgpo-jax train`. Checkpoints must lie in a bucket: a preempted slice takes its disks
# along, and the next one goes on from there. Exit code 75 (stopped after saving) is not the end of a run.
set -euo pipefail
: "${PROJECT:?}" "${ZONE:?}" "${NAME:?}" "${TYPE:?}" "${VERSION:?}" "${SOURCE:?}"
where=(--project="$PROJECT" --zone="$ZONE")

state() {
  gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' 2>/dev/null || true
}
everywhere() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" --worker=all --command="$1"
}

printf -v arguments '%q ' "$@"
while true; do
  if [ -z "$(state)" ]; then
    gcloud compute tpus queued-resources create "$NAME" "${where[@]}" --node-id="$NAME" \
      --accelerator-type="$TYPE" --runtime-version="$VERSION" --spot
  fi
  case "$(state)" in
    ACTIVE)
      everywhere "test -d pgpo_jax || git clone $(printf %q "$SOURCE") pgpo_jax"
      # The images' own Python may be older than 3.11; uv brings one.
      everywhere "cd pgpo_jax && pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --allow-existing --python 3.12"
      everywhere "cd pgpo_jax && ~/.local/bin/uv pip install --quiet -e '.[tpu]'"
      # Every host runs the same command; JAX finds the others.
      if everywhere "cd pgpo_jax && source .venv/bin/activate && pgpo-jax train $arguments"; then exit 0; fi
      # Bad input (2) and failures (1) would only come again.
      if [ "$(state)" = ACTIVE ]; then exit 1; fi
      ;;
    SUSPENDED | FAILED)
      gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
      ;;
  esac
  sleep 60
done
