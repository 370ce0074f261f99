#!/usr/bin/env bash
# The wheel, installed outside the repository, from an empty directory: every command once, on a few images.
#
#     bash tests/wheel_walkthrough.sh     # a few minutes, most of them pip's
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off

say() { echo "== ${SECONDS} s: $*"; }

say "build the wheel and install it into a fresh environment"
python3 -m venv "$folder/environment"
PATH="$folder/environment/bin:$PATH"
pip wheel --quiet --no-deps --wheel-dir "$folder" "$repository"
# not compiled: most of what is installed is never imported
pip install --quiet --no-compile --constraint "$repository/constraints.txt" "$folder"/d3etr_hf-*.whl

mkdir "$folder/empty"
cd "$folder/empty"
short=(--max_steps 2 --warmup_steps 1 --save_steps 2 --per_device_train_batch_size 2 --use_cpu true --disable_tqdm true)
data=(--data_folder data/shapes)

say "d3etr --help"
d3etr --help
say "d3etr make-shapes"
d3etr make-shapes --folder data/shapes --train_images 16 --val_images 4
say "d3etr train, with a shipped configuration"
d3etr train configs/shapes/teacher.yaml "${short[@]}" --output_dir runs/teacher
say "d3etr distill, with a shipped configuration"
accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --quiet \
    --module d3etr_hf.cli.main distill configs/shapes/distill.yaml "${short[@]}" --teacher runs/teacher \
    --output_dir runs/student
say "d3etr evaluate"
d3etr evaluate --model runs/student "${data[@]}" --use_cpu true
say "d3etr publish, the card alone"
d3etr publish runs/student
say "d3etr visualize"
d3etr visualize --model runs/student --compare runs/teacher "${data[@]}" --first 2 --use_cpu true
say "d3etr benchmark"
d3etr benchmark runs/teacher runs/student --height 96 --width 96 --use_cpu true

say "d3etr compare, what it would run"
d3etr compare configs/families/shapes.yaml --list

for file in runs/student/{model.safetensors,results.json,README.md,detections.png} runs/pictures/detections.png \
    runs/evaluation/evaluation.json; do
    test -s "$file" || { echo "$file is missing" >&2; exit 1; }
done
say "the wheel works"
