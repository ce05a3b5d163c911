#!/usr/bin/env bash
# All that only a GPU can show, in one report: build, tests, figures, tools. For a bare machine with one GPU, nvcc, cmake,
# ninja, and a Python that has torch with CUDA, pybind11, pytest and transformers. Downloads nothing; takes 9 minutes at
# most.
#
#   tools/gpu_check.sh [FOLDER]     # FOLDER/report.md and logs; by default $OUT, else build/gpu-check
#
# Each part has a limit in seconds and a line in the report. One that fails doesn't stop the rest. PYTHON says which
# Python; GPU_CHECK_SECONDS another limit in all.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
python=${PYTHON:-python3}
out=${1:-${OUT:-build/gpu-check}}
mkdir -p "$out"
out=$(realpath "$out")
build=$PWD/build/gpu
report=$out/report.md
end=$((SECONDS + ${GPU_CHECK_SECONDS:-530}))
export PYTHONPATH=$PWD:$PWD/python_tests${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
failed=0

say() { printf '%s\n' "$*" | tee -a "$report"; }

# part NAME SECONDS COMMAND...: runs it, its output in a log, and says how it ended. Gives its exit status.
part() {
  local name=$1 limit=$2 left=$((end - SECONDS)) start=$SECONDS rc word
  shift 2
  if ((left < 5)); then
    say "| $name | not run: no time left | 0 |"
    failed=$((failed + 1))
    return 125
  fi
  timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" > "$out/$name.log" 2>&1
  rc=$?
  case $rc in
    0) word=ok ;;
    124 | 137) word="stopped at its limit" ;;
    127) word="not there: $(tail -n 1 "$out/$name.log")" ;;
    *) word="FAILED ($rc): $(tail -n 1 "$out/$name.log" | cut -c1-150)" ;;
  esac
  ((rc == 0)) || failed=$((failed + 1))
  say "| $name | ${word//|/\/} | $((SECONDS - start)) |"
  return "$rc"
}

architecture() {
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2> /dev/null | head -n 1 | tr -d '. '
}

compile() {
  local of=$1
  cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DPython_EXECUTABLE="$("$python" -c 'import sys; print(sys.executable)')" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
    -DQUICKSILVER_TORCH_ROOT="$("$python" -c 'import importlib.util as u; print(u.find_spec("torch").submodule_search_locations[0])')" \
    -DQUICKSILVER_PYTHON=ON -DQUICKSILVER_TESTS=ON -DQUICKSILVER_CUDA=1 -DQUICKSILVER_EMULATOR=0 \
    -DQUICKSILVER_CUDA_ARCHITECTURES="$of-real" &&
    cmake --build "$build" --target _C quicksilver_profile quicksilver_device_tests &&
    cmake --install "$build" --component python --prefix quicksilver_ext --strip
}

operators() {
  "$python" -m pytest -q --tb=short -p no:cacheprovider -k 'cuda and not emulated' \
    python_tests/test_{attention,halting,fusion,kv_cache,matryoshka,model_cache,rollback,step,process_state}.py
}

profile() {
  local folder=$1 precision rows stage
  run() {  # KERNEL PRECISION ROWS TOKENS OPTIONS...
    local name=$1-$2-$3
    "$build/quicksilver_profile" "$1" --backend cuda --shape llama-2-7b --precision "$2" --rows "$4" --kv-type f16 \
      --json "$folder/$name.json" "${@:5}"
  }
  for precision in int8 int4; do
    for rows in 1 8 32; do
      run decode "$precision" "$rows" "$rows" --layers 4 --repeat 10 --cold-cache &&
        run prefill "$precision" "$rows" $((rows * 128)) --layers 4 --sequences "$rows" --repeat 5 || return
    done
    for rows in 1 32; do
      for stage in attention_input attention attention_output mlp_input mlp_output lm_head; do
        run "$stage" "$precision" "$rows" "$rows" --context 512 --repeat 20 --cold-cache || return
      done
    done
    for rows in 1 128 1024 4096; do
      run matryoshka_gemm "$precision" "$rows" "$rows" --matrix up --repeat 20 --cold-cache || return
    done
  done
}

sanitize() {
  compute-sanitizer --tool "$1" --error-exitcode 9 "$build/quicksilver_profile" "$2" --backend cuda --shape demo \
    --layers 2 --vocab 512 --rows "$3" --kv-type f16 --warmup 0 --repeat 1 --no-check
}

stages() {
  local stage
  for stage in attention_input attention attention_output mlp_input mlp_output; do
    ncu --set full --clock-control none --launch-count 3 -f -o "$out/$stage" \
      "$build/quicksilver_profile" "$stage" --backend cuda --shape llama-2-7b --rows 8 --context 512 \
      --kv-type f16 --warmup 1 --repeat 1 --no-check &&
      ncu --import "$out/$stage.ncu-rep" --csv --page raw > "$out/$stage.csv" &&
      rm "$out/$stage.ncu-rep" && "$python" tools/ncu_table.py "$out/$stage.csv" || return
  done
}

{
  echo "# GPU check"
  echo
  date -u +%F
  nvidia-smi --query-gpu=name,compute_cap,memory.total,driver_version --format=csv,noheader 2>&1 | head -n 1
  "$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)' 2>&1 | tail -n 1
  nvcc --version 2>&1 | tail -n 1
  git rev-parse --short HEAD 2> /dev/null
  echo
  echo "| part | how it ended | seconds |"
  echo "|---|---|---|"
} > "$report"
cat "$report"

of=${GPU_CHECK_ARCHITECTURE:-$(architecture)}
export -f compile operators profile sanitize stages
export build out python
part build 200 bash -c "compile ${of:-native}"
part operators 120 bash -c operators
part model 60 "$python" tools/gpu_check.py model
part bandwidth 20 "$python" tools/gpu_check.py bandwidth
part profile 120 bash -c "profile '$out'"
part cpp-tests 60 "$build/quicksilver_device_tests"
part memcheck 45 bash -c 'sanitize memcheck decode 3 && sanitize memcheck prefill 70'
part racecheck 45 bash -c 'sanitize racecheck decode 3 && sanitize racecheck prefill 70'
part matmul 30 "$python" tools/gpu_check.py matmul
part ncu 60 bash -c stages

say ""
for name in cpp-tests operators model; do
  [[ -f $out/$name.log ]] && say "$name: $(tail -n 1 "$out/$name.log")"
done
"$python" tools/gpu_check.py figures "$out" 2> /dev/null | tee -a "$report"
say ""
say "$failed of 10 parts failed; $SECONDS seconds in all."
((failed == 0))
