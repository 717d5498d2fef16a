#!/usr/bin/env bash
# Runs the stages of `prepare` as indexed jobs on Kubernetes, one stage after the other:
#
#   IMAGE=REGION-docker.pkg.dev/PROJECT/lory/lory_jax bash launch/gke_prepare.sh JOBS --out=gs://… --work=gs://… \
#     --source=SOURCE [flags of prepare]
#
# JOBS is the number of pods of every stage; a pod runs the tasks of the stage whose number is its index modulo JOBS.
# The pods' service account must be able to read and write the bucket. $CPU and $MEMORY are what a pod requests
# (default 1 and 4Gi). docs/gke.md says how to build the image. Run again, finished tasks are skipped.
set -euo pipefail

jobs=${1:-}
case $jobs in
  '' | *[!0-9]* | 0*) sed -n '2,9s/^# \{0,1\}//p' "$0" && exit 2 ;;
esac
shift
: "${IMAGE:?the image to run}"
stages=(plan read deduplicate split select fit encode cluster assign balance order evaluation finish)
arguments=
for argument in "$@"; do # as strings of YAML
  argument=${argument//\\/\\\\}
  arguments+=", \"${argument//\"/\\\"}\""
done

for stage in "${stages[@]}"; do
  pods=$jobs
  if [ "$stage" = finish ] || [ "$stage" = plan ]; then pods=1; fi
  name="lory-prepare-$stage"
  kubectl delete job "$name" --ignore-not-found
  kubectl apply -f - <<JOB
apiVersion: batch/v1
kind: Job
metadata: {name: $name}
spec:
  completions: $pods
  parallelism: $pods
  completionMode: Indexed
  backoffLimitPerIndex: 3
  template:
    spec:
      restartPolicy: Never
      containers:
        - name: prepare
          image: $IMAGE
          resources: {requests: {cpu: "${CPU:-1}", memory: "${MEMORY:-4Gi}"}}
          command: ["sh", "-c", "exec python -m lory_jax.prepare \"\$@\" --stage=$stage --task=\$JOB_COMPLETION_INDEX/$pods", "prepare"$arguments]
JOB
  until kubectl wait --for=condition=complete --timeout=60s "job/$name" 2>/dev/null; do
    if kubectl wait --for=condition=failed --timeout=1s "job/$name" 2>/dev/null; then
      echo "stage $stage failed; see: kubectl logs job/$name" >&2
      exit 1
    fi
  done
done
