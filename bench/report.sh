#!/bin/sh
# The report in the documentation, from real results of this machine: measure, compare, simulate, write the page, take its picture.
#
#   bench/report.sh            # all of it: some 5 minutes on 2 quiet cores
#   bench/report.sh --draw     # the page and the picture, from the results that are there
#
# Measurements go to bench/results/ (bench.json, compare.json), the page to out/report.html, the picture to docs/report.png.
# Needs chromium, Tesseract with Portuguese (apt-get install tesseract-ocr tesseract-ocr-por) and RapidOCR
# (pip install rapidocr onnxruntime). PYTHON and PRICE (dollars an hour) may be set.
set -eu
cd "$(dirname "$0")"
python=${PYTHON:-../.venv/bin/python}
price=${PRICE:-0.09} # two virtual cores at the price of an on-demand compute instance: $0.0446 each, c7i
pagemill() { "$python" -m pagemill "$@"; }

if [ "${1:-}" != --draw ]; then
    "$python" -c 'import rapidocr'
    tesseract --version >/dev/null
    pagemill bench --sweep concurrency=1,4,16,32 --price "$price" -o results/bench.json
    OMP_THREAD_LIMIT=1 pagemill compare pages/*.png --truth pages/truth.jsonl --alignment --price "$price" \
        -e pagemill-tiny -e "Tesseract=command:tesseract {image} - -l por" -e RapidOCR=python:engines:rapidocr \
        -o results/compare.json
fi
mkdir -p ../out
pagemill simulate --device l4,l40s,h100-sxm --concurrency 32,128 -o ../out/simulate.json
# shellcheck disable=SC2046
pagemill report $(ls results/bench.json results/compare.json 2>/dev/null) ../out/simulate.json -o ../out/report.html
"$python" ../tests/cost/screenshot.py ../out/report.html ../docs/report.png
