"""The study's command: its page, its record of what is done, its refusals, and all of it at the scale tiny."""

import json
import re

import numpy as np
import pytest
from jpeg_files import jpegs

from ppl_bnn.errors import FileError, Interrupted
from ppl_bnn.study.__main__ import PARTS, main
from ppl_bnn.study.page import Row, Section, Table, write_page
from ppl_bnn.study.published_layers import TABLES
from ppl_bnn.study.scales import SCALES
from ppl_bnn.study.tables import operations, tables
from ppl_bnn.study.work import Options, Work


def options(tmp_path, **given):
    runs = tmp_path / "runs"
    for name in ("study-cifar10-vgg16", "study-mnist-fc-start-9"):
        if not (runs / name).exists():
            (runs / name).mkdir(parents=True)
            (runs / name / "config.yaml").write_text("train:\n  epochs: 1\n")
    default = dict.fromkeys(("cifar10", "ranks", "cifar_image", "cifar_images", "digits"))
    return Options(**{**default, "runs": runs, "data_dir": "data", "launcher": "auto", "conv": None, **given})


def work(tmp_path, **given):
    return Work(tmp_path / "out", SCALES["tiny"], options(tmp_path, **given))


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.caption)
def test_the_layers_of_a_published_table_add_up_to_its_total(table):
    assert sum(layer.parameters for layer in table.layers) == table.trainable + table.non_trainable


def test_our_networks_have_the_parameters_of_the_study_layer_by_layer(tmp_path):
    section = tables(work(tmp_path))
    assert len(section.rows) == 18
    assert all(row.published == row.ours for row in section.rows)
    for table in section.tables:
        assert not [line for line in table.lines if line[0] == "none"]
        for line in table.lines[1:]:
            assert line[2] == "0" or line[2] == line[4]


def test_the_studys_flop_rates_are_multiples_of_the_parameters(tmp_path):
    found = [float(re.search(r"([\d.]+) times the number", row.ours)[1]) for row in operations(work(tmp_path)).rows]
    assert found == pytest.approx([30.5, 2, 30.5, 2], abs=0.05)


def test_the_page_has_every_row_with_its_source_and_command(tmp_path):
    figure = tmp_path / "figures" / "a.png"
    section = Section(
        "Figure <2>", [Row("speed | BNN", "0.5", "section 4.1", "0.49 & more")], ["python -m x"], ["why"],
        [Table("calls", [("kind", "count"), ("step", "3")])], [("A figure", figure)],
    )  # fmt: skip
    write_page([section], ["About."], tmp_path)
    markdown, html = ((tmp_path / f"study.{end}").read_text() for end in ("md", "html"))
    assert "| speed \\| BNN | 0.5 | section 4.1 | 0.49 & more | (1) |" in markdown
    assert "python -m x   # (1)" in markdown
    assert "![A figure](figures/a.png)" in markdown
    assert "<h2>Figure &lt;2&gt;</h2>" in html
    assert "<td>0.49 &amp; more</td>" in html


def test_a_command_that_is_done_is_not_run_again_until_its_run_folder_changes(tmp_path):
    mine = work(tmp_path)
    run = mine.run_folder("cifar10-vgg16")
    command = ("shape", "run", run, "--print_config")
    assert mine.do(*command, makes=[]).reason is None
    log = tmp_path / "out" / "logs" / "shape.txt"
    log.unlink()
    assert work(tmp_path).do(*command, makes=[]).reason is None
    assert not log.exists()
    (tmp_path / "runs" / "study-cifar10-vgg16" / "config.yaml").write_text("train:\n  epochs: 2\n")
    work(tmp_path).do(*command, makes=[])
    assert "epochs: 2" in log.read_text()


def test_a_command_that_fails_says_why_and_is_tried_again(tmp_path):
    mine = work(tmp_path)
    outcome = mine.do("bad", "run", str(tmp_path / "nowhere"), makes=[])
    assert "there is no" in outcome.reason
    assert mine.do("bad", "run", str(tmp_path / "nowhere"), makes=[]) is mine.failures["bad"]
    assert outcome.or_reason("not measured").startswith("not measured (error: there is no")
    assert work(tmp_path).do("bad", "run", str(tmp_path / "nowhere"), makes=[]).reason == outcome.reason


def test_a_stopped_command_stops_the_study(tmp_path, monkeypatch):
    mine = work(tmp_path)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 75\n")
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(Interrupted, match="stopped in python"):
        mine.do("stopped", "run", "--help", makes=[])


def test_what_uses_a_result_that_was_made_again_is_made_again(tmp_path):
    run = work(tmp_path).run_folder("cifar10-vgg16")
    numbers = iter((1.0, 2.0))

    def both():
        mine = work(tmp_path)
        mine.do("first", "run", run, "--print_config", makes=[])
        return mine.do("second", "run", "--help", makes=[], after=["first"], read=lambda: next(numbers)).found

    assert both() == both() == 1.0
    (tmp_path / "runs" / "study-cifar10-vgg16" / "config.yaml").write_text("train:\n  epochs: 2\n")
    assert both() == both() == 2.0


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"ppl_bnn": "0.0.9", "scale": "tiny", "commands": {}}, "ppl_bnn 0.0.9, this one has"),
        ({"scale": "tiny"}, "is damaged; delete it"),
        ("[", "is damaged; delete it"),
    ],
)
def test_a_folder_of_another_version_or_a_damaged_one_is_refused(tmp_path, record, message):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "study.json").write_text(record if isinstance(record, str) else json.dumps(record))
    with pytest.raises(FileError, match=re.escape(message)):
        work(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scale", "huge"], "--scale must be one of tiny, small, full; got 'huge'"),
        (["--parts", "figure-1"], "got 'figure-1'"),
        (["--digits", "3", "10000"], "--digits takes numbers of test images, 0 to 99 at the scale small; got 10000"),
        (["--cifar_image", "-1"], "--cifar_image takes numbers of test images"),
        (["--ranks", "0"], "--ranks must be at least 1"),
        (["--runs", "nowhere"], "--runs nowhere has no study-... run folders"),
        (["--conv", "nowhere"], "--conv takes an out folder with checkpoints; there are none in nowhere"),
        (["--cifar10", "nowhere.npz"], "there is no nowhere.npz"),
        (["--launcher", "{rank}"], "--launcher takes a command"),
    ],
)
def test_a_bad_command_is_one_line_before_any_work(tmp_path, capsys, arguments, message):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# Parts that need several ranks.
OF_RANKS = ("figure-2", "cycle-time")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pytestconfig):
    """A folder with archives of a few made-up images and on real digits."""
    folder = tmp_path_factory.mktemp("study")
    np.savez(folder / "c.npz", **jpegs(103)[0])
    return folder


@pytest.mark.slow
@pytest.mark.large
def test_all_other_parts_at_a_tiny_scale_fill_every_row(whole, data_dir, capsys):
    arguments = ["--scale", "tiny", "--out", str(whole / "out"), "--data_dir", str(data_dir)]
    parts = [name for name in PARTS if name not in OF_RANKS]
    arguments += ["--cifar10", str(whole / "c.npz"), "--parts", ",".join(parts)]
    assert main(arguments) == 0, capsys.readouterr().err
    page = (whole / "out" / "study.md").read_text()
    rows = [line for line in page.splitlines() if re.search(r"\| \(\d+\) \|$", line)]
    assert len(rows) >= 40
    assert not [row for row in rows if "not measured" in row and "needs several ranks" not in row]
    for path in re.findall(r"!\[.*?\]\((.*?)\)", page):
        assert (whole / "out" / path).stat().st_size > 1000
    assert page.count("\n## ") == len(parts) + 1
    capsys.readouterr()
    assert main(arguments) == 0
    assert "study: python" not in capsys.readouterr().err


@pytest.mark.slow
def test_several_ranks_fill_the_rows_that_need_them_or_say_why(whole, data_dir, capsys):
    arguments = ["--scale", "tiny", "--ranks", "1", "2", "--out", str(whole / "ranks"), "--data_dir", str(data_dir)]
    arguments += ["--cifar10", str(whole / "c.npz"), "--parts", ",".join(OF_RANKS)]
    assert main([*arguments, "--launcher", "torch"]) == 0, capsys.readouterr().err
    page = (whole / "ranks" / "study.md").read_text()
    throughput, cycle = page.split("## ")[1:3]
    assert "not measured" not in throughput
    assert "| of it: gradients, a bucket each |" in throughput
    assert "| **Bcast** |" in throughput
    assert "not measured: torchrun has no such settings, Horovod has" in cycle
