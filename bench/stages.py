"""Checkpoints of pagemill-tiny at earlier stages of its training, for measuring weaker models.

python bench/stages.py stage1 FOLDER
"""

from __future__ import annotations

import argparse
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

STAGES = ("stage1", "stage2", "final")
_WEIGHTS = Path(__file__).parent / "models"


def stage_folder(stage: str, folder: Path, **settings: Any) -> Path:
    """Return a checkpoint folder of one of STAGES, made of links below `folder`; `settings` change its `pagemill.json`."""
    embedded = Path(str(files("pagemill") / "assets" / "pagemill-tiny"))
    if stage == "final" and not settings:
        return embedded
    target = folder / "-".join(["pagemill-tiny", stage, *(f"{k}={v}" for k, v in settings.items())])
    target.mkdir(parents=True, exist_ok=True)
    for file in embedded.iterdir():
        link = target / file.name
        source = file
        if file.name == "model.safetensors" and stage != "final":
            source = _WEIGHTS / f"{stage}.safetensors"
        if file.name == "pagemill.json" and settings:
            link.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | settings))
        elif not link.exists():
            link.symlink_to(source.resolve())
    return target


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    print(stage_folder(args.stage, args.folder))


if __name__ == "__main__":
    main()
