#!/usr/bin/env bash
# Installs entropix_jax on every worker of a TPU slice, runs it there, and brings the logs back.
#
#   scripts/tpu_pod.sh install --name=NAME --zone=ZONE [--project=ID] [--python=python3.11]
#   scripts/tpu_pod.sh run     --name=NAME --zone=ZONE [--project=ID] -- ARGS of entropix_jax.main
#   scripts/tpu_pod.sh collect --name=NAME --zone=ZONE [--project=ID] [--out=FOLDER]
#
# --dry_run prints the commands instead. The slice must exist: nothing is created or deleted here.
# See docs/pods.md.
set -euo pipefail

readonly REMOTE=entropix_jax # below the home folder of every worker

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0"
}

# One word for a POSIX shell, whatever is in it.
quote() {
  printf "'%s'" "${1//\'/\'\\\'\'}"
}

# Print the command, and do it unless this is a dry run.
call() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=@,+-]+$ ]]; then line+=" $word"; else line+=" $(quote "$word")"; fi
  done
  echo "+$line" >&2
  if [[ -z $dry_run ]]; then "$@"; fi
}

# A bash script on every worker at once; the first failure is ours.
on_all() {
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all \
    --command="bash -o pipefail -c $(quote "$1")"
}

install() {
  local root scratch=SCRATCH
  root=$(cd "$(dirname "$0")/.." && pwd)
  if [[ -z $dry_run ]]; then
    git -C "$root" rev-parse --verify --quiet HEAD >/dev/null ||
      fail "$root is no git checkout with a commit; what is committed is what gets installed."
    [[ -z $(git -C "$root" status --porcelain) ]] ||
      echo "warning: changes that are not committed are not installed." >&2
    scratch=$(mktemp -d)
    # shellcheck disable=SC2064 # the folder of now
    trap "rm -rf $(quote "$scratch")" EXIT
  fi
  call git -C "$root" archive --format=tar.gz --output="$scratch/$REMOTE.tar.gz" HEAD
  call gcloud compute tpus tpu-vm scp "$scratch/$REMOTE.tar.gz" "$name:" "${where[@]}" --worker=all
  on_all "set -e
command -v $(quote "$python") >/dev/null || { echo \"error: \$(hostname) has no $python; install one or name another with --python.\" >&2; exit 2; }
mkdir -p $REMOTE && tar -xzf $REMOTE.tar.gz -C $REMOTE && cd $REMOTE
$(quote "$python") -m venv .venv && .venv/bin/pip install -q -e '.[tpu]'
echo \"\$(hostname): entropix_jax is installed.\""
}

run() {
  [[ ${#args[@]} -gt 0 ]] || fail "nothing to run; give flags of entropix_jax.main after --."
  local command=".venv/bin/python -m entropix_jax.main --distributed" word
  for word in "${args[@]}"; do command+=" $(quote "$word")"; done
  on_all "cd $REMOTE && mkdir -p runs && $command < /dev/null 2>&1 | tee runs/\$(hostname).log"
}

collect() {
  local workers=1 worker
  local count=(gcloud compute tpus tpu-vm describe "$name" "${where[@]}"
    "--format=value(networkEndpoints.len())")
  if [[ -n $dry_run ]]; then
    call "${count[@]}"
    echo "then, for each worker, as for worker 0:" >&2
  else
    workers=$("${count[@]}")
    [[ $workers =~ ^[1-9][0-9]*$ ]] || fail "gcloud does not say how many workers $name has."
  fi
  # gcloud copies from one worker at a time.
  for ((worker = 0; worker < workers; worker++)); do
    call mkdir -p "$out/worker$worker"
    call gcloud compute tpus tpu-vm scp --recurse "$name:$REMOTE/runs" "$out/worker$worker" \
      "${where[@]}" "--worker=$worker"
  done
}

[[ $# -gt 0 ]] || fail "say install, run or collect; --help tells more."
verb=$1
shift
case $verb in
  install | run | collect) ;;
  -h | --help | help) usage && exit 0 ;;
  *) fail "unknown command $verb; known are install, run and collect." ;;
esac

name="" zone="" project="" python=python3 out=pod_runs dry_run="" args=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --project=?*) project=${1#*=} ;;
    --python=?*) python=${1#*=} ;;
    --out=?*) out=${1#*=} ;;
    --dry_run) dry_run=yes ;;
    --)
      shift
      args=("$@")
      break
      ;;
    *) fail "unknown argument $1; known are --name= --zone= --project= --python= --out= --dry_run." ;;
  esac
  shift
done
[[ -n $name ]] || fail "name the slice with --name=NAME."
[[ -n $zone ]] || fail "name its zone with --zone=ZONE."
[[ $verb == run || ${#args[@]} -eq 0 ]] || fail "only run takes arguments after --."
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
[[ -n $dry_run ]] || command -v gcloud >/dev/null ||
  fail "gcloud is not installed; get the Google Cloud CLI, or look at the commands with --dry_run."
"$verb"
