#!/usr/bin/env bash
# A run on SLURM: Ray's head on the first node of the allocation, a worker on each other one, the command beside the head.
#
#     sbatch cluster/slurm.sh jobs/train_uda.py --recipe daformer_gta2cityscapes data.labeled=/shared/gta ...
#     sbatch --nodes=4 --time=24:00:00 cluster/slurm.sh tune/sweep.py --space tune/spaces/uda.yaml
#
# Two minutes before the time limit (and when an administrator takes the nodes back, where that sends SIGTERM) the run saves,
# and the allocation asks for its place in the queue again and goes on from there, as after a lost node. `scancel --batch
# --signal=INT JOB` saves and ends for good. Run from the folder of the project, which all nodes see under one path, with its
# environment in .venv (python3 jobs/in_venv.py makes it) or the one named by ECOCSEG_VENV.
#SBATCH --job-name=ecocseg
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
set -euo pipefail

cd "${SLURM_SUBMIT_DIR:-$PWD}"
export PATH="${ECOCSEG_VENV:-$PWD/.venv}/bin:$PATH"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"     # workers import the project from here
export RAY_USAGE_STATS_ENABLED=0
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=90         # a node that is told to end leaves the run so long to save
# Nobody but this job's processes gets in: a token of its own, in the environment that srun hands on.
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN

# Ports and folders from the job's number, so that jobs sharing a node stay out of each other's way.
port=$((20000 + SLURM_JOB_ID % 10000))
temporary=/tmp/ray-$SLURM_JOB_ID
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
address=$(srun --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" hostname -I | awk '{print $1}')
export RAY_ADDRESS=$address:$port

start=(--num-cpus="${SLURM_CPUS_PER_TASK:?the script needs --cpus-per-task}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --block)
step=(srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=0)
"${step[@]}" --nodes=1 --ntasks=1 --nodelist="${nodes[0]}" \
    ray start --head --node-ip-address="$address" --port="$port" --ray-client-server-port="$((port + 10000))" \
    --temp-dir="$temporary" --include-dashboard=false "${start[@]}" &
steps=($!)

stop_ray() {
    kill "${steps[@]}" 2> /dev/null || true
    wait "${steps[@]}" 2> /dev/null || true
}
trap stop_ray EXIT

for _ in $(seq 60); do      # the head answers within seconds; two minutes cover a slow file system
    ray health-check --address "$RAY_ADDRESS" > /dev/null 2>&1 && break
    sleep 2
done
ray health-check --address "$RAY_ADDRESS"
if ((${#nodes[@]} > 1)); then
    others=$(IFS=,; echo "${nodes[*]:1}")
    "${step[@]}" --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --nodelist="$others" \
        ray start --address="$RAY_ADDRESS" "${start[@]}" &
    steps+=($!)
fi
python cluster/wait_for_nodes.py "${#nodes[@]}"

# A run must keep its name, or a requeued job would not find what it has saved; relative folders lie in the project's.
command=("$@")
case "$1" in
    jobs/train_*) [[ " $* " == *" run.name="* ]] || command+=("run.name=$SLURM_JOB_NAME-$SLURM_JOB_ID") ;;
    tune/sweep.py) [[ " $* " == *" --name "* ]] || command+=(--name "$SLURM_JOB_NAME-$SLURM_JOB_ID") ;;
esac
[[ " $* " == *" --resume"* || "$1" != jobs/train_* && "$1" != tune/sweep.py ]] || command+=(--resume auto)

requeue=no signalled=no
python "${command[@]}" &
driver=$!
save() {
    signalled=yes
    kill -TERM "$driver" 2> /dev/null || true
}
trap 'requeue=yes; save' TERM
trap save INT
code=0
while :; do                 # a signal ends `wait`, not the run, which is saving
    signalled=no status=0
    wait "$driver" || status=$?
    ((status == 127)) || code=$status       # 127: it had been waited for already
    [[ $signalled == yes ]] || break
done
if [[ $requeue == yes && $code != 0 ]]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
