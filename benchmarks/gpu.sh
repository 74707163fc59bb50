#!/usr/bin/env bash
# What needs a GPU, in one command and less than nine minutes: bash benchmarks/gpu.sh [PART …]
#
# Kernels are checked and timed, then GPT-2 XL's layers are profiled, then all of it is trained as eight processes over
# the emulated network, and last come all tests of the kernels. Parts: build, speed, profile, pipeline, tests; without
# one, all of them. The machine needs Python with PyTorch for CUDA, which brings Triton; no network, and wantrain need
# not be installed. What wantrain depends on must be there for the last two (pydantic, safetensors, xxhash), and with
# nvcc the CUDA C++ kernels are built too. Results go to $OUT (default: benchmarks/results), all else to a temporary
# folder. It says what could not run, and fails if something that ran was wrong. A copy without .git is told its commit
# by WANTRAIN_COMMIT, which stands beside the figures.
set -uo pipefail
cd "$(dirname "$0")/.."
export OUT=${OUT:-$PWD/benchmarks/results}
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
failed=() missing=() parts=("$@")
LIMIT_S=530

stage() {
  local title=$1 limit_s=$(($2 < LIMIT_S - SECONDS ? $2 : LIMIT_S - SECONDS)) began=$SECONDS status=0
  shift 2
  printf '\n=== %s\n' "$title"
  ((limit_s > 0)) || { failed+=("$title: no time left"); return 1; }
  timeout "$limit_s" "$@" </dev/null || status=$?
  ((status == 124)) && echo "stopped after $limit_s s"
  printf '=== %s: %s, %d s\n' "$title" "$( ((status)) && echo "FAILED (status $status)" || echo ok)" $((SECONDS - began))
  ((status == 0)) || failed+=("$title")
  return "$status"
}

wants() {
  [[ ${#parts[@]} == 0 || " ${parts[*]} " == *" $1 "* ]]
}

for part in "$@"; do
  [[ " build speed profile pipeline tests " == *" $part "* ]] && continue
  echo "no part '$part' (expected build, speed, profile, pipeline or tests)"
  exit 2
done

has() {
  "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"
}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "$python has no PyTorch that sees a GPU; set PYTHON to one that does"
  exit 2
fi
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
"$python" -c 'import sys, torch, triton; print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, Triton {triton.__version__}")' ||
  missing+=('Triton: its kernels')

# The package is copied, so that a built library lies beside it without touching the checkout.
mkdir -p "$OUT" "$scratch/kernels"
cp -r kernels/wantrain_kernels "$scratch/kernels/"
export PYTHONPATH=$scratch/kernels:$PWD:$PWD/kernels:$PWD/benchmarks${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
export TRITON_CACHE_DIR=$scratch/triton

build_cuda() {
  local architecture
  architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
  stage 'CUDA C++: build' 120 env WANTRAIN_CUDA=1 WANTRAIN_CUDA_ARCHITECTURES="$architecture" \
    "$python" setup.py --quiet build_ext --build-lib "$scratch/kernels" --build-temp "$scratch/build"
}

if ! command -v nvcc >/dev/null; then
  missing+=('nvcc: the CUDA C++ kernels')
elif ! has setuptools; then
  missing+=('setuptools: the CUDA C++ kernels')
elif wants build; then
  build_cuda
fi

wants speed && stage 'kernels: the bytes of the reference, then speed' 150 "$python" benchmarks/bench_kernels.py

if has pydantic && has safetensors && has xxhash; then
  wants profile && stage "GPT-2 XL: what its layers cost" 60 \
    "$python" -m wantrain profile --model gpt2_xl --device cuda --dtype bf16 --out "$OUT/gpt2_xl_bf16.json"
  wants pipeline && stage 'GPT-2 XL: eight stages on this GPU, over the emulated network' 200 \
    "$python" benchmarks/bench_gpu_pipeline.py --microbatches 8 --steps 4 --systems raw,aqsgd --out "$OUT"
  has matplotlib && stage 'pictures' 30 "$python" benchmarks/pictures.py "$OUT" "$OUT/pictures"
else
  missing+=('pydantic, safetensors or xxhash: the profile and the pipeline of GPT-2 XL')
fi

if ! has pytest; then
  missing+=('pytest: the tests of tests/kernels; the check of bench_kernels.py ran')
elif wants tests; then
  spread=()
  has xdist && spread=(-n "$(nproc)")
  stage 'kernels: all tests on the GPU' 300 "$python" -m pytest tests/kernels -o addopts= -o filterwarnings= \
    -p no:cacheprovider -q --durations=10 -m 'not slow' "${spread[@]}"
fi

echo
((${#missing[@]})) && printf 'not there, so not run: %s\n' "${missing[@]}"
((${#failed[@]})) && printf 'failed: %s\n' "${failed[@]}" && exit 1
echo "all that could run holds ($SECONDS s); results in $OUT"
