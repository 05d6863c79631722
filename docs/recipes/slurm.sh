#!/bin/bash
#SBATCH --job-name=nf4
#SBATCH --cpus-per-task=4
#SBATCH --mem=4G
#SBATCH --time=02:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=nf4-%A_%a.log
# Usage: sbatch --array=1-$(wc -l < models.txt) slurm.sh models.txt
#
# models.txt has a line for each task: MODEL OUTPUT. A component of a pipeline is a model too:
# FLUX.1-dev/transformer FLUX-transformer-nf4. OUTPUT must be on a file system that every node sees,
# because another node may continue it. 120 seconds before its time is up, a task stops, keeps finished
# work, and is queued again. The same happens after exit code 4, five times at most.
set -uo pipefail

read -r model output < <(sed -n "${SLURM_ARRAY_TASK_ID}p" "$1")
if [ -z "${output:-}" ]; then
  echo "$1 has no line ${SLURM_ARRAY_TASK_ID} with MODEL OUTPUT" >&2
  exit 2
fi

# In the background, so that the shell can take Slurm's signals meanwhile. scancel and preemption
# send TERM; then Slurm itself decides whether the task runs again.
nf4 quantize "$model" "$output" --memory 3GB --workers "${SLURM_CPUS_PER_TASK:-4}" --resume &
nf4=$! signals=0 again=4
trap 'signals=$((signals + 1)); kill -TERM "$nf4" 2>/dev/null' TERM
trap 'signals=$((signals + 1)); again=130; kill -TERM "$nf4" 2>/dev/null' USR1
# A signal ends `wait` early; the next one has nf4's exit code.
code=0 seen=-1
while [ "$seen" != "$signals" ]; do
  seen=$signals code=0
  wait "$nf4" || code=$?
done

[ "$code" != 143 ] || code=130 # the signal came before nf4 had begun
if [ "$code" = "$again" ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 5 ]; then
  scontrol requeue "$SLURM_JOB_ID"
elif [ "$code" = 0 ]; then
  nf4 verify "$output" --memory 3GB || code=$?
fi
exit "$code"
