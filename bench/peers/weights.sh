#!/usr/bin/env bash
# The checkpoint and its converted forms, FOLDER/weights:  weights.sh FOLDER [hf|openvino-int8|openvino-int4|gguf ...]
#
# After install.sh, with the interpreter (PYTHON) that has pagemill. The checkpoint is noise of the 3B shape; to time a trained one,
# link its folder as FOLDER/weights/hf first: what is there is kept. 20 GB of disk, and 7 more meanwhile.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/weights" && folder=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- hf openvino-int8 openvino-int4 gguf
weights=$folder/weights
export HF_HUB_OFFLINE=1

for form in "$@"; do
  case $form in
    hf) [ -e "$weights/hf" ] || "${PYTHON:-python3}" "$here/../make_checkpoint.py" --preset 3b -o "$weights/hf" ;;
    openvino-*) # optimum's defaults: int4 is the decoder in groups of 128; the vision tower and the embedding have 8 bits
      [ -e "$weights/$form" ] || "$folder/openvino/bin/python" "$here/make_openvino.py" "$weights/hf" \
        "${form#openvino-}" "$weights/$form"
      ;;
    gguf) # the vision tower stays in bfloat16
      source=$(echo "$folder"/llama_cpp_python-*/vendor/llama.cpp)
      mkdir -p "$weights/gguf"
      "$folder/transformers/bin/python" "$here/make_gguf.py" convert "$source" "$weights/hf" "$weights/gguf"
      "$folder/llamacpp/bin/python" "$here/make_gguf.py" quantize "$weights/gguf" q8_0 q4_0
      rm "$weights/gguf/text-bf16.gguf"
      ;;
    *) echo "no such form: $form" >&2; exit 2 ;;
  esac
  echo "$form: done"
done
