#!/usr/bin/env bash
# The package as its users get it: sdist → wheel → a clean environment → one page, read from another folder.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

echo "packaging: sdist"
# From a copy of what git knows, so that nothing built before can find its way into the archive.
mkdir "$work/tree"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/tree"
"$python" -m venv "$work/tools"
"$work/tools/bin/python" -m pip install -q build
"$work/tools/bin/python" -m build --sdist --outdir "$work" "$work/tree" >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }

echo "packaging: wheel from the sdist"
"$work/tools/bin/python" -m pip wheel -q --no-deps --wheel-dir "$work" "$work"/pagemill-*.tar.gz
"$work/tools/bin/python" - "$work"/pagemill-*.whl "$root" <<'EOF'
import sys
import zipfile
from pathlib import Path

wheel, root = zipfile.ZipFile(sys.argv[1]), Path(sys.argv[2])
names = set(wheel.namelist())
modules = {f"pagemill/{path.relative_to(root / 'runtime')}" for path in (root / "runtime").rglob("*.py")}
modules |= {f"pagemill/kernels/{path.relative_to(root / 'kernels')}" for path in (root / "kernels").rglob("*.py")}
assets = {f"pagemill/{path.relative_to(root / 'runtime')}" for path in (root / "runtime/assets").rglob("*.*")}
assets |= {f"pagemill/{path.relative_to(root / 'runtime')}" for folder in ("data", "assets")
           for path in (root / "runtime/cost" / folder).iterdir()}
expected = modules | assets | {"pagemill/py.typed", "pagemill/_native.pyi"}
assert not (missing := expected - names), f"missing from the wheel: {sorted(missing)}"
assert any(name.startswith("pagemill/_native.") and name.endswith(".so") for name in names), "no _native in the wheel"
strangers = {n for n in names - expected if not n.startswith(("pagemill/_native.", "pagemill-"))}
assert not strangers, f"in the wheel by accident: {sorted(strangers)}"
print(f"packaging: {len(names)} files in the wheel, {Path(sys.argv[1]).stat().st_size / 1e6:.1f} MB")
EOF

echo "packaging: clean environment"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -q -c requirements-dev.txt "$work"/pagemill-*.whl
mkdir "$work/elsewhere"
cd "$work/elsewhere"
"$work/venv/bin/pagemill" --version
"$work/venv/bin/pagemill" read "$root/bench/pages/prose_00.png" -o page.jsonl
"$work/venv/bin/python" - <<'EOF'
import json

(line,) = open("page.jsonl", encoding="utf-8")
record = json.loads(line)
assert record["status"] == "ok", record
assert len(record["text"]) > 100, record
EOF
echo "packaging: ok"
