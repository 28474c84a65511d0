#!/usr/bin/env bash
# Runs all benchmarks on a GPU within 20 minutes and keeps their results under benchmarks/results/.
#
#   benchmarks/gpu.sh              # everything
#   benchmarks/gpu.sh train        # only those whose name begins so
#
# Needs jax with CUDA, flax, optax, torch, transformers; no network. A failure or a run over its
# time limit does not stop the others; they are named at the end, and the exit status is then 1.
# PYTHON chooses the interpreter, LOGS the folder of the full outputs.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
logs=${LOGS:-$(mktemp -d)}
mkdir -p "$logs"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
# PyTorch and JAX share the card: neither may take all of it at the start.
export XLA_PYTHON_CLIENT_PREALLOCATE=false PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
deadline=$((SECONDS + 1190))
wanted=${1:-}
failed=()

# run NAME LIMIT COMMAND...: at most LIMIT seconds, and never beyond the deadline
run() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS status
  shift 2
  [[ $name == "$wanted"* ]] || return 0
  if ((left < 20)); then
    failed+=("$name (no time left)")
    return 0
  fi
  echo "== $name: $*"
  timeout -k 10 "$((limit < left ? limit : left))" "$@" >"$logs/$name.log" 2>&1
  status=$?
  if ((status != 0)); then
    failed+=("$name (status $status after $((SECONDS - start)) s)")
    tail -n 15 "$logs/$name.log"
  else # all but the JSON, which is saved
    sed '$d' "$logs/$name.log" | grep -v '^W0\|^I0\|Loading weights' | tail -n 25
  fi
  echo "== $name: $((SECONDS - start)) s, status $status"
}

echo "$("$python" -c 'import jax; print(jax.__version__, jax.devices())' 2>&1 | tail -n 1)"
# The same losses as PyTorch, in float32 products: everything below rests on it.
run parity 120 env JAX_DEFAULT_MATMUL_PRECISION=highest \
  "$python" benchmarks/train_step.py --preset tiny --repeats 3 --save
run train_step_smollm2_135m 180 "$python" benchmarks/train_step.py --preset smollm2_135m --save
run train_step_qwen3_1.7b 300 "$python" benchmarks/train_step.py --preset qwen3_1.7b --save
run lora_qwen3_1.7b 240 "$python" benchmarks/train_step.py \
  --preset qwen3_1.7b --lora-rank 16 --rows 8 --remat full --save
run train_step_qwen3_0.6b 200 "$python" benchmarks/train_step.py --preset qwen3_0.6b --save
run fused_pass 240 "$python" benchmarks/fused_pass.py --save
run step_overhead 100 "$python" benchmarks/step_overhead.py --save
run sampler_qwen3_0.6b 330 \
  "$python" benchmarks/sampler.py --preset qwen3_0.6b --repeats 1 --save
run sampler_qwen3_1.7b 200 \
  "$python" benchmarks/sampler.py --preset qwen3_1.7b --repeats 1 --no-transformers --save

echo "outputs in $logs"
if ((${#failed[@]})); then
  printf 'failed: %s\n' "${failed[@]}"
  exit 1
fi
