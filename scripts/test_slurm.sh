#!/usr/bin/env bash
# Test the SLURM scripts on a real cluster: two nodes in name, both this machine, made in a temporary
# directory and stopped at the end. Takes about 12 minutes on two busy cores. Usage, as root:
#   apt-get install slurm-wlm munge     # Debian's; any SLURM of 22.05 or later will do
#   bash scripts/test_slurm.sh
# KD_PYTHON: the Python to use instead of that of .venv, which scripts/setup.sh makes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repo=$PWD
for tool in slurmctld slurmd munged sbatch srun scontrol scancel curl; do
  PATH=$PATH:/usr/sbin command -v "$tool" >/dev/null ||
    { echo "$tool is not installed: apt-get install slurm-wlm munge curl" >&2; exit 2; }
done
[ "$(id -u)" = 0 ] || { echo "the daemons start jobs as other users: run this as root" >&2; exit 2; }
python=${KD_PYTHON:-$(bash scripts/setup.sh test)}
PATH=$(dirname "$python"):$PATH:/usr/sbin
export PATH OMP_NUM_THREADS=1

# ---- a cluster -----------------------------------------------------------------------------------

dir=$(mktemp -d)
mkdir -m 700 "$dir/munge"
mkdir "$dir/state"
head -c 128 /dev/urandom >"$dir/munge/key"
chmod 400 "$dir/munge/key"
cat >"$dir/slurm.conf" <<CONF
ClusterName=kd
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=16817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge/socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=5
SchedulerParameters=sched_interval=2
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
MailProg=/bin/true
NodeName=kd[1-2] NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=[16818-16819] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$dir/slurm.conf
stop() {
  local status=$?
  [ "$status" = 0 ] || tail -n 20 "$dir"/*.log "$dir"/site/*.log
  scancel --user=root --quiet || true
  scontrol shutdown || true
  munged --stop --socket="$dir/munge/socket" || true
  echo "stopped; left in $dir"
}
trap stop EXIT
munged --force --socket="$dir/munge/socket" --key-file="$dir/munge/key" \
  --pid-file="$dir/munge/pid" --seed-file="$dir/munge/seed" --log-file="$dir/munge/log"
slurmctld
slurmd -N kd1
slurmd -N kd2
timeout 30 srun --nodes=2 hostname >/dev/null
sinfo

# ---- what is run ---------------------------------------------------------------------------------

mkdir "$dir/site"
cd "$dir/site"
scripts=$repo/scripts/slurm
tiny=(
  student=digits_small train.max_steps=24 train.log_every=1 train.val_every=null data.val_samples=10
  data.num_workers=0 optim.warmup_steps=2 parallel.cpu_threads=1 doctor=never logger=jsonl
)
alone=(--config-name digits_teacher "${tiny[@]}" train.global_batch_size=8 train.micro_batch_size=4)
say() { echo; echo "== $*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
has_steps() { [ -e "runs/$1/metrics.jsonl" ] && [ "$(wc -l <"runs/$1/metrics.jsonl")" -ge "$2" ]; }
wait_for() { # wait_for SECONDS COMMAND…
  local ends=$((SECONDS + $1))
  shift
  until "$@"; do
    [ "$SECONDS" -lt "$ends" ] || fail "waited too long for: $*"
    sleep 0.3
  done
}
job_state() { scontrol show job "$1" | grep -oP 'JobState=\K\w+'; }
is_state() { [ "$(job_state "$1")" = "$2" ]; }
is_idle() { [ "$(sinfo --noheader --format=%t | sort -u)" = idle ]; }
start_again() { # start_again JOB: at once; a queued job begins only after a while
  wait_for 60 is_state "$1" PENDING
  wait_for 60 is_idle
  sleep 2 # what the job was allowed to do on a node is revoked, to the second
  scontrol update JobId="$1" StartTime=now
}
same_metrics() {
  python - "$1" "$2" <<'PY'
import sys
from pathlib import Path
from kd.logger.read import read_metrics
one, other = (read_metrics(Path("runs", name)) for name in sys.argv[1:])
for key in ("train/loss", "train/grad_norm", "train/lr"):
    assert len(one[key]) == 24 and [s for s, _ in one[key]] == [s for s, _ in other[key]], key
    far = max(abs(a - b) / abs(a) for (_, a), (_, b) in zip(one[key], other[key], strict=True))
    print(f"{key}: 24 steps, relative difference at most {far:.1e}")
    assert far < 1e-5, key
PY
}

say "train.sbatch on two nodes of one rank each"
sbatch --wait --nodes=2 "$scripts/train.sbatch" "${alone[@]}" run.name=whole

say "train.sbatch on one node of two ranks: asked to stop, queued again, resumed"
job=$(KD_RANKS_PER_NODE=2 sbatch --parsable "$scripts/train.sbatch" "${alone[@]}" run.name=preempted)
wait_for 240 has_steps preempted 4
scancel --batch --signal=USR1 "$job"
start_again "$job"
cat runs/preempted/status.json; echo
wait_for 300 is_state "$job" COMPLETED
cat runs/preempted/status.json; echo
cat "kd-$job.log"
scontrol show job "$job" | grep -o "Restarts=1" || fail "job $job has not been started again"
same_metrics whole preempted

say "a mistake ends the job, and is not tried again"
sbatch --wait "$scripts/train.sbatch" --config-name digits_teacher nonsense=1 && fail "no error"
job=$((job + 1))
cat "kd-$job.log"
scontrol show job "$job" | grep -o "Restarts=0 .*ExitCode=2:0" || fail "job $job has not ended with 2"

say "sweep.sbatch: two points"
printf '# two points\noptim.lr=0.001 optim.schedule=constant\n\noptim.lr=0.01 optim.schedule=cosine\n' >points.txt
sbatch --wait --array=1-2 "$scripts/sweep.sbatch" \
  points.txt runs/lr_sweep "${alone[@]}" train.max_steps=6
python -m kd.sweep runs/lr_sweep --plot sweep.png
[ "$(grep -l '"finished"' runs/lr_sweep/*/status.json | wc -l)" = 2 ] || fail "two finished points"

say "with_vllm.sbatch: a teacher of kd.serve beside a run"
teacher=$PWD/runs/whole/export
# shellcheck disable=SC2016 # each job has a PORT of its own
serve='python -m kd.serve teacher.name='"$teacher"' serve.host=0.0.0.0 serve.port=$PORT parallel.device=cpu parallel.cpu_threads=1'
export KD_SERVE_TOKEN=$RANDOM$RANDOM
distil=(--config-name digits_kd "${tiny[@]}" train.max_steps=6 train.micro_batch_size=4 teacher=server "teacher.name=$teacher")
sbatch --wait "$scripts/with_vllm.sbatch" teacher.urls "$serve" \
  "${distil[@]}" run.name=served
cat kd-with-vllm-*.log
grep -q '"finished"' runs/served/status.json || fail "the served run"

say "with_vllm.sbatch: a server that ends, ends the job"
sbatch --wait "$scripts/with_vllm.sbatch" teacher.urls "exit 3" \
  "${distil[@]}" run.name=unserved && fail "no error"

say "hydra/launcher=submitit_slurm: two points; and two of which one is wrong"
# It asks the accounting first, which there is none of here.
KD=(python -m kd.run -m --config-name digits_teacher "${tiny[@]}" train.max_steps=6
  train.micro_batch_size=4 hydra/launcher=submitit_slurm hydra.launcher.timeout_min=30
  hydra.launcher.cpus_per_task=1)
"${KD[@]}" run.name=jobs optim.lr=0.001,0.01 2> >(grep -v "sacct\|accounting" >&2)
"${KD[@]}" run.name=wrong optim.schedule=constant,nonsense 2> >(grep -v "sacct\|accounting" >&2) &&
  fail "no error"

say "hydra/launcher=submitit_slurm: two ranks asked to stop, queued again, resumed"
"${KD[@]}" run.name=queued train.max_steps=24 train.global_batch_size=8 parallel.nproc=2 \
  2> >(grep -v "sacct\|accounting" >&2) &
waits=$!
wait_for 300 has_steps queued_sweep 4
job=$(squeue --noheader --states=RUNNING --format=%A)
scancel --signal=USR2 "$job"
start_again "$job"
cat runs/queued_sweep/status.json; echo
wait "$waits"
grep -h "Requeued\|resuming" runs/queued_sweep/.submitit/*/*.err || fail "not queued again"
same_metrics whole queued_sweep

say "all passed"
