"""The data guide: it tells of every data set, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from smolrun.data.splits import open_split

ROOT = Path(__file__).resolve().parents[2]
GUIDE = (ROOT / "docs" / "data.md").read_text()


def test_every_data_set_has_its_line() -> None:
    told = re.findall(r"^\| `(\w+)` \|.*`smolrun", GUIDE, re.MULTILINE)
    assert sorted(told) == sorted(path.stem for path in (ROOT / "conf" / "data").glob("*.yaml"))


def test_the_example_of_your_own_data_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", GUIDE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    prepared = names["Letters"](tmp_path, count=200).prepare(lambda what, done, total: None)
    assert " characters in 200 documents" in prepared.description
    assert len(open_split(prepared, "train", verify=True)) == prepared.train_size
