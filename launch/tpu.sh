#!/usr/bin/env bash
# Runs lory_jax on a Cloud TPU, through queued resources:
#
#   bash launch/tpu.sh COMMAND --name=NAME --zone=ZONE [OPTIONS] [-- VERB ARGUMENTS]
#
# Commands
#   check    get the TPU ready and run `python -m lory_jax.doctor` on it: the first thing to do
#   run      get the TPU ready, run `python -m lory_jax.VERB ARGUMENTS` on all workers and follow the
#            log; after a preemption, request the TPU again and run the same command again
#   create   request the TPU
#   wait     wait until the TPU is there
#   install  install this commit and its requirements on all workers
#   logs     follow the log of the command that is running
#   status   print the state of the TPU
#   stop     stop the command that is running; it saves first
#   delete   delete the TPU, which costs money until then
#
# Options
#   --type=TYPE      accelerator type, such as v5litepod-256, v5p-128, v6e-64; required to create
#   --slices=N       number of slices of that type, joined by the data centre's network (default 1)
#   --version=V      software version (default: depends on the type)
#   --project=P      project (default: gcloud's own)
#   --spot           request a TPU that is cheaper but can be preempted
#   --reserved       request a reserved TPU (default without either: on demand)
#   --restarts=N     how often a preempted TPU is requested again, or all processes are restarted
#                    because one died (default 20)
#   --dry-run        print every command, but run none
#
# Example
#   bash launch/tpu.sh run --name=lory --zone=us-west4-a --type=v5litepod-256 --spot -- \
#     train --config=configs/lory_0_3b.py:experts=32 --data=gs://B/data --workdir=gs://B/lory
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh

POLL_SECONDS=${LORY_POLL_SECONDS:-30}
LOST_CONNECTIONS=10 # in a row, while the TPU is still there
# Worker 0 died, or reports that another one did: aborted, killed, segmentation fault, peer died.
DEATHS='134 137 139 75'

# ---------------------------------------------------------------- what is asked for
command='' name='' zone='' type='' slices=1 version='' project='' tier='' restarts=20 dry_run=''
words=()
while [ $# -gt 0 ]; do
  case $1 in
    -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "launch/$(basename "$0")" && exit 0 ;;
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --version=?*) version=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --slices=?*) slices=${1#*=} ;;
    --restarts=?*) restarts=${1#*=} ;;
    --spot | --reserved) tier=$1 ;;
    --dry-run) dry_run=1 ;;
    --) shift && words=("$@") && break ;;
    --*) fail "$1: unknown or without a value; see --help" ;;
    *) [ -z "$command" ] || fail "$1: got a second command after $command; VERB and its arguments go after --"
      command=$1 ;;
  esac
  shift
done
case $command in
  check | run | create | wait | install | logs | status | stop | delete) ;;
  '') fail "COMMAND: missing; must be check, run, create, wait, install, logs, status, stop or delete; see --help" ;;
  *) fail "$command: unknown command; must be check, run, create, wait, install, logs, status, stop or delete" ;;
esac
[ -n "$name" ] || fail "--name: missing"
[ -n "$zone" ] || fail "--zone: missing"
for number in "--slices=$slices" "--restarts=$restarts"; do
  case ${number#*=} in *[!0-9]* | '') fail "${number%%=*}: got '${number#*=}', must be a number" ;; esac
done
[ "$slices" -ge 1 ] || fail "--slices: got $slices, must be at least 1"
case $command in
  check) words=(doctor ${words[@]+"${words[@]}"}) ;;
  run) [ ${#words[@]} -gt 0 ] || fail "run: requires -- VERB ARGUMENTS, such as -- train --config=..." ;;
  *) [ ${#words[@]} -eq 0 ] || fail "$command: got arguments after --; only run and check accept them" ;;
esac
if [ -z "$version" ]; then
  case $type in
    v5lite*) version=v2-alpha-tpuv5-lite ;;
    v5p*) version=v2-alpha-tpuv5 ;;
    v6e*) version=v2-alpha-tpuv6e ;;
    *) version=tpu-ubuntu2204-base ;;
  esac
fi
[ -n "$dry_run" ] || command -v gcloud >/dev/null || fail "gcloud: not found; install the Google Cloud SDK"

# ---------------------------------------------------------------- gcloud
where=("--zone=$zone")
[ -z "$project" ] || where+=("--project=$project")

# Prints a command so that it can be pasted into a shell.
print_command() {
  local word
  for word in "$@"; do
    case $word in
      *[!A-Za-z0-9_./:=@,+-]* | '') printf "'%s' " "${word//\'/\'\\\'\'}" ;;
      *) printf '%s ' "$word" ;;
    esac
  done
  echo
}

# Runs `gcloud compute tpus queued-resources ...`, or prints it.
queued() {
  set -- gcloud compute tpus queued-resources "$@" "${where[@]}"
  if [ -n "$dry_run" ]; then print_command "$@"; else "$@"; fi
}

# Runs launch/worker.sh with these arguments on every worker of every slice, or on the first.
on_all() { queued ssh "$name" --node=all --worker=all --command="$(worker_command "$@")"; }
on_first() { queued ssh "$name" --node=0 --worker=0 --command="$(worker_command "$@")"; }

worker_command() {
  printf 'bash lory_jax/launch/worker.sh'
  printf ' %q' "$@"
}

# Prints the state; MISSING if there is no such queued resource.
state() {
  local found attempt
  for attempt in 1 2 3 4 5; do
    if found=$(queued describe "$name" '--format=value(state.state)' 2>&1); then
      echo "$found" && return
    fi
    case $found in *NOT_FOUND*) echo MISSING && return ;; esac
    sleep "$attempt" # a failure of the network or of the cloud is likely to pass
  done
  fail "$(echo "$found" | grep -m 1 ERROR || echo "gcloud: ${found:-no answer}")"
}

# ---------------------------------------------------------------- the commands
create() {
  local nodes=("--node-id=$name") found=MISSING
  [ -n "$type" ] || fail "--type: missing; must be an accelerator type such as v5litepod-256"
  if [ "$slices" -gt 1 ]; then nodes=("--node-count=$slices" "--node-prefix=$name"); fi
  if [ -z "$dry_run" ]; then found=$(state) || exit 1; fi
  case $found in
    MISSING) ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      echo "$name is $found: deleting it before requesting it again"
      delete
      ;;
    *)
      echo "$name already exists: $found"
      return
      ;;
  esac
  queued create "$name" "--accelerator-type=$type" "--runtime-version=$version" "${nodes[@]}" \
    ${tier:+"$tier"}
}

# Returns 1 if the TPU was preempted before it was ready.
wait_until_active() {
  local found last=''
  if [ -n "$dry_run" ]; then
    queued describe "$name" '--format=value(state.state)'
    return
  fi
  while :; do
    found=$(state) || exit 1
    [ "$found" = "$last" ] || echo "$(date +%H:%M:%S) $name: $found"
    last=$found
    case $found in
      ACTIVE) return 0 ;;
      SUSPENDING | SUSPENDED) return 1 ;;
      FAILED) fail "$name: the request failed: $(queued describe "$name" \
        '--format=value(state.failedData.error.message)')" ;;
      DELETING | MISSING) fail "$name: $found; create it first" ;;
    esac
    sleep "$POLL_SECONDS"
  done
}

is_active() {
  local found
  if [ -n "$dry_run" ]; then return 0; fi
  found=$(state) || exit 1
  [ "$found" = ACTIVE ]
}

install() { # returns 1 if it fails on a worker
  local directory=/tmp
  if [ -n "$dry_run" ]; then
    print_command git archive --prefix=lory_jax/ "--output=$directory/lory_jax.tar.gz" HEAD
  else
    directory=$(mktemp -d)
    if [ -n "$(git status --porcelain --untracked-files=no)" ]; then
      echo "note: installing the last commit, without uncommitted changes" >&2
    fi
    git archive --prefix=lory_jax/ "--output=$directory/lory_jax.tar.gz" HEAD ||
      fail "install: requires a git checkout"
  fi
  queued scp "$directory/lory_jax.tar.gz" "$name:" --node=all --worker=all || return 1
  [ -n "$dry_run" ] || rm -r "$directory"
  queued ssh "$name" --node=all --worker=all --command="tar xzf lory_jax.tar.gz" || return 1
  on_all install || return 1
}

run() {
  local attempt=0 ending what
  while :; do
    create
    what="was preempted: requesting it again"
    if wait_until_active && install && on_all start "${words[@]}"; then
      ending=0
      until_it_ends || ending=$?
      [ "$ending" -ne 0 ] || return 0
      if [ "$ending" -eq 2 ]; then
        what="lost a process: restarting all of them"
        on_all kill || true
      fi
    else
      ! is_active || fail "$name: installing or starting failed on a worker; see above"
    fi
    attempt=$((attempt + 1))
    [ "$attempt" -le "$restarts" ] || fail "$name ${what%%:*} again after $restarts restarts, and --restarts=$restarts allows no more"
    echo "$name $what ($attempt of at most $restarts)"
  done
}

# Returns 0 if the run succeeded, 1 if the TPU is gone, 2 if a process died; exits if the run
# failed.
until_it_ends() {
  local result lost=0
  while :; do
    on_first follow || true
    [ -z "$dry_run" ] || return 0
    result=$(on_first result) || result=''
    if [ "$result" = 0 ]; then
      echo "done; $name costs money until you run: bash launch/tpu.sh delete --name=$name ${where[*]}"
      return 0
    fi
    sleep "$POLL_SECONDS" # workers notice a preemption before the queue does
    is_active || return 1
    case " $DEATHS " in *" ${result:-none} "*) return 2 ;; esac
    [ -z "$result" ] || fail "the run failed with status $result; $name is still there"
    lost=$((lost + 1))
    [ "$lost" -lt "$LOST_CONNECTIONS" ] || fail "$name: lost the connection $lost times"
    echo "lost the connection: reconnecting"
  done
}

delete() {
  local found
  if [ -z "$dry_run" ]; then
    found=$(state) || exit 1
    if [ "$found" = MISSING ]; then
      echo "$name does not exist"
      return
    fi
  fi
  queued delete "$name" --force --quiet
}

case $command in
  check | run) run ;;
  create) create ;;
  wait) wait_until_active || fail "$name: was preempted; create it again" ;;
  install) install || fail "$name: installing failed on a worker; see above" ;;
  logs) on_first follow ;;
  stop) on_all stop ;;
  delete) delete ;;
  status) if [ -n "$dry_run" ]; then wait_until_active; else state; fi ;;
esac
