"""The code of docs/training.md on steering a training runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "training.md"


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8").partition("## A checkpoint in Python")[0]
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 5
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"best NLL {min(row['val_nll'] for row in names['history']):.3f}")
    assert (tmp_path / "validated" / "checkpoints" / "best.safetensors").exists()
    assert lines[1] == "from step 0"
    assert names["terms"].loss > 0


def test_the_line_of_a_training_is_the_equation_that_the_page_says():
    (line,) = re.findall(r"^loss .*samples/s$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    parts = dict(part.split(" ") for part in line.split(", ")[:4])
    loss, nll, kl, kl_weight = (float(parts[name]) for name in ("loss", "nll", "kl", "kl_weight"))
    assert abs(loss - nll - kl_weight * kl) < 2e-4
