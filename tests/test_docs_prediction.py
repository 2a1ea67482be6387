"""The code of docs/prediction.md runs as it stands."""

import re
from pathlib import Path

from small_posteriors import X, Y, dense

from ppl_bnn import Classifier

PAGE = Path(__file__).parent.parent / "docs" / "prediction.md"


def test_the_code_of_the_page_runs():
    net, guide = dense()
    names: dict = {"model": Classifier(net, len(X)), "net": net, "guide": guide, "x": X, "y": Y, "image": X[:1]}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), names)
    assert names["found"].num_samples == 20
    assert names["probs"].shape == (1, 3)
