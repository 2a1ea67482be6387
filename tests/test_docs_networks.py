"""The code of docs/networks.md runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "networks.md"


def test_the_code_of_the_page_runs():
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    assert list(names["guide"].sites) == [
        "embed.weight", "recurrent.weight_ih_l0", "recurrent.weight_hh_l0", "head.weight",
    ]  # fmt: skip
