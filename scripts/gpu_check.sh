#!/usr/bin/env bash
# What is to be known of a GPU in a quarter of an hour, the most important first; each part under a time limit of its
# own, its result written as it arrives, so that a check that is cut still tells something.
#
#     bash scripts/gpu_check.sh OUT            # on a GPU; results in OUT
#     QUICK=1 bash scripts/gpu_check.sh OUT    # the same on a CPU, tiny, in two minutes
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:?usage: gpu_check.sh OUT}
mkdir -p "$out"
quick=${QUICK:-}
python=${PYTHON:-python}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

if [ -n "$quick" ]; then
  export OMP_NUM_THREADS=1
  steps=2 teacher_steps=2 images=8 cpu=(--use_cpu true) precisions=(float32 bf16) val_images=4
else
  steps=400 teacher_steps=1500 images=4000 cpu=() precisions=(float32 bf16 fp16)
fi

# part NAME SECONDS COMMAND...: run it under its limit, keep what it prints, say how it ended
part() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  echo "$name: exit $status after $((SECONDS - start)) s" | tee -a "$out/parts.txt"
  [ $status -eq 0 ] || tail -n 5 "$out/$name.log"
}

train() { # train COMMAND CONFIGURATION NAME OPTIONS...: one run on the shapes
  local command=$1 configuration=$2 name=$3
  shift 3
  part "$name" "${limit:-150}" "$python" -m d3etr_hf.cli.main "$command" "configs/shapes/$configuration.yaml" \
    --data_folder "$out/shapes" --output_dir "$out/runs/$name" --eval_strategy no --save_strategy no \
    --logging_steps 20 --warmup_steps 2 "${cpu[@]}" "$@"
  "$python" - "$out/runs/$name/results.json" "$name" <<'P' | tee -a "$out/results.txt"
import json, sys
try:
    found = json.load(open(sys.argv[1]))
    print(f"{sys.argv[2]}: AP {found.get('AP', float('nan')):.4f} AP75 {found.get('AP75', float('nan')):.4f} "
          f"{1e3 * found['seconds'] / found['steps']:.1f} ms a step")
except OSError:
    print(f"{sys.argv[2]}: no result")
P
}

"$python" - <<'P' | tee "$out/card.txt"
import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU", "torch", torch.__version__)
P
part make_shapes 60 "$python" -m d3etr_hf.cli.main make-shapes --folder "$out/shapes" --train_images "$images" --val_images "${val_images:-50}"

# 1. a short distillation in every precision, and compiled: finite, and as good as in float32
train train teacher teacher --max_steps "$teacher_steps"
for precision in "${precisions[@]}"; do
  options=(--max_steps "$steps" --teacher "$out/runs/teacher")
  [ "$precision" = float32 ] || options+=("--$precision" true)
  train distill distill "distilled_$precision" "${options[@]}"
done
# compiling takes a CPU minutes
[ -n "$quick" ] || limit=200 train distill distill distilled_compiled --max_steps "$steps" \
  --teacher "$out/runs/teacher" --torch_compile true

# 2. and 3. what a step costs and waits for, and matching's part of it, at real size
for precision in no bf16 fp16; do
  [ -n "$quick" ] && [ "$precision" != no ] && continue
  measured=(--size real --rounds 8)
  [ "$precision" = no ] || measured+=(--steps_alone true)
  [ -z "$quick" ] || measured=(--size shapes --rounds 2 --steps_alone true)
  part "benchmark_$precision" 150 "$python" scripts/benchmark.py "${measured[@]}" --precision "$precision" \
    --json "$out/benchmark_$precision.json"
  tail -n 40 "$out/benchmark_$precision.log"
done

# 4. two processes equal to one; 5. models, losses and the trainer on the device
[ -n "$quick" ] || part two_processes 120 "$python" -m pytest -q -x tests/test_distributed.py
[ -n "$quick" ] || part tests 200 "$python" -m pytest -q tests/models tests/losses tests/matching tests/training
cat "$out/parts.txt" "$out/results.txt"
