#!/usr/bin/env bash
# The wheel, installed outside the repository, from an empty directory: every command once, on a few images, and from
# Python with a folder of the user's own. The last lines are a table of the commands with their seconds.
#
#     bash tests/wheel_walkthrough.sh     # a few minutes, most of them pip's
set -euo pipefail

repository="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
unset PYTHONPATH PYTHONDONTWRITEBYTECODE # what is imported is compiled once, not by every command
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off
table=()

# step NAME COMMAND...: runs the command, and its seconds become a row of the table
step() {
    local name="$1" start="$SECONDS"
    shift
    echo "== $start s: $name"
    "$@"
    table+=("$(printf '| %-42s | %4d |' "$name" $((SECONDS - start)))")
}

python_example() {
    python - "$1" <<'PYTHON'
import sys
from pathlib import Path

from transformers import pipeline

from d3etr_hf import D3etrTrainer, D3etrTrainingArguments
from d3etr_hf.data import DataArguments, load_splits
from d3etr_hf.models.image_processors import load_image_processor
from d3etr_hf.models.loading import ModelArguments, build_model, load_detector

own = sys.argv[1]
processor = load_image_processor("runs/teacher")
train, val = load_splits(DataArguments(data_folder=own), processor)
student = build_model(ModelArguments(model_config="configs/shapes/student_model.yaml"), train.class_names)
args = D3etrTrainingArguments("runs/python", max_steps=2, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True)
trainer = D3etrTrainer(
    student,
    args,
    teacher=load_detector("runs/teacher", "teacher"),
    train_dataset=train,
    eval_dataset=val,
    processing_class=processor,
)
trainer.train()
print("AP", trainer.evaluate()["eval_AP"])
trainer.save_model("runs/python")
image = next(path for path in Path(own).rglob("*") if path.suffix in (".jpg", ".png"))
pipeline("object-detection", model="runs/python", device="cpu")(str(image), threshold=0.0)
PYTHON
}

metadata() {
    python - <<'PYTHON'
import importlib.metadata
from pathlib import Path

import d3etr_hf

wheel = importlib.metadata.metadata("d3etr_hf")
assert wheel["Version"] == d3etr_hf.__version__ and wheel["License-Expression"] == "Apache-2.0"
assert "every DETR" in wheel["Summary"] and wheel["Description-Content-Type"] == "text/markdown"
assert wheel.get_all("Project-URL") and len(wheel.get_all("Classifier")) > 5
package = Path(d3etr_hf.__file__).parent
teacher = [f"model_cards/shapes_teacher/{name}" for name in ("model.safetensors", "config.json", "results.json")]
assert (package / "py.typed").is_file()  # it is empty
for name in ("configs/shapes/distill.yaml", "publishing/model_card.md.jinja", *teacher):
    assert (package / name).stat().st_size > 0, name
PYTHON
}

python3 -m venv "$folder/environment"
PATH="$folder/environment/bin:$PATH"
step "pip wheel" pip wheel --quiet --no-deps --wheel-dir "$folder" "$repository"
wheel=("$folder"/d3etr_hf-*.whl)
# not compiled: most of what is installed is never imported
step "pip install" pip install --quiet --no-compile --constraint "$repository/constraints.txt" "${wheel[0]}[onnx]"

mkdir "$folder/empty"
cd "$folder/empty"
short=(--max_steps 2 --warmup_steps 1 --save_steps 2 --per_device_train_batch_size 2 --use_cpu true --disable_tqdm true)
data=(--data_folder data/shapes)
launch=(accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --quiet
    --module d3etr_hf.cli.main)

step "what the wheel says of itself" metadata
step "d3etr --help" d3etr --help
step "d3etr make-shapes" d3etr make-shapes --folder data/shapes --train_images 16 --val_images 4
step "d3etr data check" d3etr data check data/shapes
shipped="$(python -c "from d3etr_hf.configurations import shipped; print(shipped('model_cards') / 'shapes_teacher')")"
step "d3etr predict, by the wheel's own teacher" d3etr predict "$shipped" data/shapes/val --use_cpu true
step "d3etr analyze" d3etr analyze "$shipped" "${data[@]}" --use_cpu true
step "d3etr train" d3etr train configs/shapes/teacher.yaml "${short[@]}" --output_dir runs/teacher
step "accelerate launch, d3etr distill" "${launch[@]}" distill configs/shapes/distill.yaml "${short[@]}" \
    --teacher runs/teacher --output_dir runs/student
step "d3etr evaluate" d3etr evaluate --model runs/student "${data[@]}" --use_cpu true
step "d3etr publish, the card alone" d3etr publish runs/student
step "d3etr export" d3etr export runs/student
step "d3etr visualize" d3etr visualize --model runs/student --compare runs/teacher "${data[@]}" --first 2 --use_cpu true
step "d3etr benchmark" d3etr benchmark runs/teacher runs/student --height 96 --width 96 --use_cpu true
step "d3etr compare, what it would run" d3etr compare configs/families/shapes.yaml --list
cp -r data/shapes "$folder/my pictures"
step "from Python, a folder of one's own" python_example "$folder/my pictures"

for file in runs/student/{model.safetensors,results.json,README.md,detections.png} runs/pictures/detections.png \
    runs/evaluation/evaluation.json runs/student/model.onnx runs/python/model.safetensors \
    runs/predictions/predictions.json runs/analysis/analysis.json runs/data_check/annotations.png; do
    test -s "$file" || { echo "$file is missing" >&2; exit 1; }
done
echo "== $SECONDS s: the wheel works"
printf '| %-42s | %s\n' command "   s |" "$(printf -- '-%.0s' {1..42})" "-----|"
printf '%s\n' "${table[@]}"
