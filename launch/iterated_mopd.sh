#!/usr/bin/env bash
# Iterated multi-teacher on-policy distillation: two rounds of student -> experts retrained from it -> student.
#
#     launch/iterated_mopd.sh [START] [OUTPUT] [ROUNDS]     # after: make demo
#
# Every stage is an ordinary run with its own directory. The script can be stopped and restarted at any time: a
# complete stage is skipped, an interrupted one resumes from its newest checkpoint.
set -euo pipefail
umask o= # as the runs do: prompts and samples are not accessible to others
start=${1:-runs/demo/base/checkpoints}
output=${2:-runs/iterated}
rounds=${3:-2}
recipes=$(dirname "$0")/recipes

declare -A tasks=(
  [leg_counting]='{min_animals: 2, max_animals: 2, max_instances: 3}'
  [palindrome_generation]='{min_length: 3, max_length: 4}'
)

student=$start
for ((round = 1; round <= rounds; round++)); do
  directory=$output/round_$round
  for task in "${!tasks[@]}"; do
    echo "== round $round: expert for $task, from $student"
    python -m megatron_mopd.train --config "$recipes/iterated_expert.yaml" \
      "run_dir=$directory/experts/$task" "student.load=$student" \
      "data.prompts=[{task: $task, params: ${tasks[$task]}, size: 12000, seed: $((20 + round))}]"
  done
  echo "== round $round: distillation into $student"
  mkdir -p "$directory/mopd" # the paths of its teachers go through this directory
  python -m megatron_mopd.train --config "$recipes/iterated_mopd.yaml" \
    "run_dir=$directory/mopd" "student.load=$student"
  student=$directory/mopd/checkpoints
done
echo "the student of round $rounds: $student"
