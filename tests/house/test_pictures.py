"""The pictures of the docs are those of the code as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_pictures_are_fresh(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "pictures.py", tmp_path], check=True)
    for page in tmp_path.rglob("*.md"):
        name = page.relative_to(tmp_path)
        shipped = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert shipped == page.read_text(encoding="utf-8"), f"docs/{name}: run `make docs`"
