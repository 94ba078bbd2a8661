#!/usr/bin/env bash
# Everything that a GPU is needed for, in runs of less than 9 minutes each, on a machine with torch and triton and no
# network:
#
#     bench/gpu.sh [1|2|3|4] OUTDIR             # results into OUTDIR, written as they come, and in OUTDIR.tar.gz
#     bench/gpu.sh --dry-run [1|2|3|4] OUTDIR   # every step without a GPU, on made devices and tiny shapes
#
# Run 1: is it right (tests, sanitizers), and the kernels by name. Run 2: sweeps of what a GPU must decide, and the host.
# Run 3: the tables, and counters of the row kernels. Run 4: a ResNet-18 trained on CIFAR-10 with cross-entropy and with
# ELogitNorm, and compared, if DATA is a folder with CIFAR-10 in OpenOOD's layout. Without a number: all under one deadline.
#
# The most important steps come first. A step that would begin after the deadline is left out, one that is still running
# at its limit is stopped, and the summary (OUTDIR/summary.txt, printed last too) says so for each. Exit code: 0 if all
# steps that ran passed, 1 if one failed, 2 without a GPU. GPU settings (clocks, power, modes) are read, never changed.
#
# PYTHON (default python3), DEADLINE (seconds, default 495), DATA, and EPOCHS of run 4 (default 30) can be set.
set -uo pipefail

python=${PYTHON:-python3}
deadline=${DEADLINE:-495}
least=15 # seconds: what has fewer left does not begin
# The one switch of a dry run: entry points get --dry, tests and benchmarks are collected, tools of NVIDIA do nothing.
dry="" collect=()
if [ "${1:-}" = "--dry-run" ]; then dry=--dry collect=(--collect-only); shift; fi
runs="1 2 3 4"
case "${1:-}" in 1 | 2 | 3 | 4) if [ $# -eq 2 ]; then runs=$1; shift; fi ;; esac
if [ $# -ne 1 ] || [ "${1#-}" != "$1" ]; then
  echo "usage: bench/gpu.sh [--dry-run] [1|2|3|4] OUTDIR" >&2
  exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
summary="$out/summary.txt"
: > "$summary"
failed=0
export PYTHONUNBUFFERED=1

say() { echo "$*" | tee -a "$summary"; }

# step NAME LIMIT COMMAND...: run it with at most LIMIT seconds, and no longer than the deadline; log to OUTDIR/NAME.log.
step() {
  local name=$1 limit=$2 left status began
  shift 2
  left=$((deadline - SECONDS))
  if [ "$left" -lt "$least" ]; then
    say "$name: LEFT OUT, $left s left"
    return 0
  fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  began=$SECONDS
  timeout --signal=INT --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1
  status=$?
  if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
    say "$name: STOPPED after $((SECONDS - began)) s, its limit; what it wrote until then is kept"
    failed=1
  elif [ "$status" -ne 0 ]; then
    say "$name: FAILED with exit code $status after $((SECONDS - began)) s; the end of its log:"
    tail -n 15 "$out/$name.log" | tee -a "$summary"
    failed=1
  else
    say "$name: ok, $((SECONDS - began)) s: $(grep -v '^ *$' "$out/$name.log" | tail -n 1 | cut -c 1-150)"
  fi
}

run() { [[ " $runs " == *" $1 "* ]]; }

if [ -n "$dry" ]; then
  mkdir -p "$out/tools"
  for tool in nvidia-smi ncu compute-sanitizer; do # the last two end with the command that they watch
    printf '#!/bin/sh\nwhile [ $# -gt 0 ] && [ "$1" != "$PYTHON" ]; do shift; done\nexec "$@"\n' > "$out/tools/$tool"
    chmod +x "$out/tools/$tool"
  done
  export PYTHON=$python PATH="$out/tools:$PATH"
fi

has() { command -v "$1" > /dev/null 2>&1; }

bench() { # bench NAME LIMIT PYTEST-ARGUMENTS...: one JSON a step, so that a limit costs no more than that step
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m pytest "$@" --benchmark-only --benchmark-json="$out/$name.json" -q \
    -p no:cacheprovider "${collect[@]}"
}

if [ -z "$dry" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> "$out/gpu.log"; then
  say "no GPU found by torch ($python): nothing was run"
  exit 2
fi

# ---- what this is

if has nvidia-smi; then
  step environment 20 nvidia-smi -q -d CLOCK,MEMORY,POWER,TEMPERATURE,PERFORMANCE
fi
step versions 60 "$python" -c 'import json; from bench.measure import environment; print(json.dumps(environment()))'
step install 90 "$python" -m pip install --no-deps --no-build-isolation --no-index --quiet -e . ${dry:+--dry-run}
# A Python that nothing may be installed into finds the package here, but not this part of it.
"$python" -c 'import ood_fast.kernels' 2>> "$out/install.log" ||
  { ln -sfn ../kernels ood_fast/kernels && trap 'rm -f ood_fast/kernels' EXIT; }

files=(tests/test_elogitnorm.py tests/test_nci.py tests/test_logitnorm.py tests/test_linear_elogitnorm.py
  tests/test_losses.py tests/test_ops.py tests/test_training_loops.py tests/test_launches.py tests/test_fused_row.py)
parallel=()
if "$python" -c 'import xdist' 2> /dev/null; then parallel=(-n 16 --dist load); fi

if run 1; then
  # ---- is it right

  # Hundreds of kernels compile cold, so both go side by side, and the steps below find them in Triton's cache.
  step small_step 150 "$python" -m bench.gpu_smoke $dry
  # The files of the loss and NCI: `backend` in tests/conftest.py runs each of their tests on the GPU too, odd shapes
  # included.
  step tests 180 "$python" -m pytest "${files[@]}" -m gpu -q --maxfail=10 --continue-on-collection-errors \
    -p no:cacheprovider "${parallel[@]}" "${collect[@]}"

  # ---- does it touch memory that is not its own or that nobody wrote, and do its threads race

  if has compute-sanitizer; then
    for tool in memcheck initcheck racecheck; do # blind behind PyTorch's allocator, which hands out what it has freed
      step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
        "$python" -m bench.gpu_smoke --once $dry
    done
  else
    say "memcheck, initcheck, racecheck: LEFT OUT, compute-sanitizer is not installed"
  fi

  # ---- the kernels by name, beside what bench.static predicts: one process for all shapes

  step kernel_times 90 "$python" -m bench.kernel_times --shapes 65536x1000x2048 4096x21841x768 $dry \
    --out "$out/kernel_times.json"
  step kernel_times_small 45 "$python" -m bench.kernel_times --shapes 128x100x512 --dtype float32 $dry \
    --out "$out/kernel_times_small.json"
  step predicted 90 "$python" -m bench.static --measured "$out"/kernel_times*.json $dry
fi

if run 2; then
  step sweep 300 "$python" -m bench.sweep --out "$out/sweep.json" $dry
  step host 60 "$python" -m bench.host $dry
  step other_tests 120 "$python" -m pytest tests -m gpu -q --maxfail=10 --continue-on-collection-errors \
    -p no:cacheprovider "${parallel[@]}" "${files[@]/#/--ignore=}" "${collect[@]}"
fi

if run 3; then
  bench targets 60 bench/test_gpu_targets.py
  bench imagenet 90 bench/test_loss.py -k "ImageNet-1K-bf16 and not compile and not literal"
  bench linear 60 bench/test_linear.py -k "100k"
  bench scores 45 bench/test_nci.py
  bench loss 90 bench/test_loss.py -k "not ImageNet-1K-bf16 and not compile"
  bench linear_others 45 bench/test_linear.py -k "not 100k"
  bench compiled 60 bench/test_loss.py -k "compile"
  for others in detectors statistics; do
    if [ -f "bench/test_$others.py" ]; then bench "$others" 45 "bench/test_$others.py"; fi
  done
  if has ncu; then
    step counters 60 ncu --set full -k "regex:fused_row|tempered|row_statistics|nci_forward" -c 12 -o "$out/rows" \
      "$python" -m bench.gpu_smoke --once $dry
  fi
fi

if run 4; then
  training=(--benchmark cifar10 --data-root "${DATA:-}" --ood tin,mnist,svhn,texture --epochs "${EPOCHS:-30}" --amp bf16
    --channels-last --detectors MSP,Energy,GEN,ReAct,NCI,FDBD,KNN)
  if [ -n "$dry" ]; then training=(--benchmark digits --epochs 1 --detectors MSP,NCI); fi
  if [ -z "$dry" ] && [ ! -d "${DATA:-}" ]; then
    say "training: LEFT OUT, DATA names no folder with CIFAR-10"
  else # stopped at its limit, it keeps what is trained, and the same command continues it
    step training "$deadline" "$python" -m ood_fast compare "${training[@]}" --losses ce,elogitnorm --seeds 1 \
      --out "$out/training"
  fi
fi

# ---- tables and plots of what there is

if [ -n "$dry" ]; then cp bench/results/amd-epyc-2-threads/results.json "$out/made.json"; fi
mapfile -t results < <(find "$out" -maxdepth 1 -name '*.json' ! -name 'kernel_times*.json' ! -name sweep.json -size +0 | sort)
# A second or two, of a time of its own: a step that the deadline stopped may have taken all of its ten seconds to end.
deadline=$((deadline + 25)) least=5
if [ "${#results[@]}" -gt 0 ]; then
  step report 15 "$python" -m bench.report "${results[@]}" --out "$out/report"
fi
if has nvidia-smi; then timeout 5 nvidia-smi --query-gpu=name,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv >> "$summary"; fi
tar czf "$out.tar.gz" --exclude='*.ckpt' --exclude=cache -C "$(dirname "$out")" "$(basename "$out")" # weights stay here
echo
echo "==== $SECONDS s; everything is in $out, and in $out.tar.gz"
cat "$summary"
exit "$failed"
