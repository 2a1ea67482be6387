"""The code of docs/data.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "data.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 9
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    (record,) = names["train"](names["DataLoader"](names["Squares"](), batch_size=50))
    assert record["step"] == 10
