#!/usr/bin/env bash
# Builds the null CUDA device against the CUDA build of torch that the given python has; seconds. Needs g++ and nm.
#
#   bash bench/null_cuda/build.sh .venv-cuda/bin/python      build/null_cuda.so and build/libcuda.so.1, made anew when something changed
set -euo pipefail
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
cd "$(dirname "$0")"
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
include=$site/nvidia/cu13/include
[ -f "$include/cuda.h" ] || { echo "error: $python has no CUDA build of torch (no $include/cuda.h)" >&2; exit 2; }
stamp=$(cat ./*.cpp ./*.py build.sh "$site/torch/version.py" | sha256sum)
[ "$(cat build/stamp 2> /dev/null)" != "$stamp" ] || exit 0
mkdir -p build
for library in torch_cuda c10_cuda torch_cuda_linalg torch_python caffe2_nvrtc torch_cpu; do
    nm -D --undefined-only "$site/torch/lib/lib$library.so" | awk '{print $2}' | sed 's/@.*//'
done | sort -u > build/imports.txt
"$python" make_stubs.py build/imports.txt "$include/cuda.h" build
g++ -O1 -std=c++17 -shared -fPIC -Iinclude -Ibuild -I"$include" null_cuda.cpp -o build/null_cuda.so -ldl
g++ -O1 -shared -fPIC build/driver.cpp -Wl,-soname,libcuda.so.1 -o build/libcuda.so.1
echo "$stamp" > build/stamp
