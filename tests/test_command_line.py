"""The one command in front of all: what it says without torch, what it calls, and the recipes that come with it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ppl_bnn.__main__ import COMMANDS, main
from ppl_bnn.errors import did_you_mean
from ppl_bnn.experiment.recipes import config_of, recipes
from ppl_bnn.experiment.saved_config import out_of
from ppl_bnn.version import __version__

ROOT = Path(__file__).parent.parent


def python(*arguments, **options):
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, **options)


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--version"], ["rnu"], []], ids=str)
def test_the_front_answers_without_torch(arguments):
    code = (
        "import sys; from ppl_bnn.__main__ import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'pyro', 'numpy', 'jsonargparse'} & sys.modules.keys(); assert not heavy, heavy; "
        "sys.exit(code)"
    )
    done = python("-W", "error", "-c", code, *arguments)
    assert done.returncode == (0 if arguments and arguments[0].startswith("-") else 2), done.stderr


def test_help_names_every_command_and_where_to_begin(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"\n    {name} " in text
        assert command.about in text
    for line in ("ppl_bnn run mnist-fc", "ppl_bnn init my-run --data my.csv --target price", "ppl_bnn run my-run"):
        assert f"    {line} " in text
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ppl_bnn {__version__}\n"


def test_an_unknown_command_is_one_line_with_the_nearest_name(capsys):
    assert main(["imprt"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: there is no command 'imprt' (did you mean import?); the commands are run, init,")


@pytest.mark.any_python
@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_under_its_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        sys.exit(main([name, "--help"]))
    assert end.value.code == 0
    assert re.search(rf"^usage: .*ppl_bnn[ .]{name}", capsys.readouterr().out)


@pytest.mark.any_python
def test_the_front_the_module_and_a_recipe_by_name_say_the_same(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    tables = [
        python(*command, "--stages", "summary", cwd=tmp_path, env=environment)
        for command in (
            ["-m", "ppl_bnn", "run", "mnist-fc"],
            ["-m", "ppl_bnn.run", ROOT / "runs" / "mnist-fc"],
            ["-m", "ppl_bnn.run", "mnist-fc"],
        )
    ]
    assert [done.returncode for done in tables] == [0, 0, 0], tables[0].stderr
    assert tables[0].stdout == tables[1].stdout == tables[2].stdout
    assert "Trainable parameters:              538,122" in tables[0].stdout
    # A summary writes nothing.
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU OpenMP on Linux")
def test_threads_of_ppl_bnn_run_wait_awake_for_a_short_time():
    known = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = python("-m", "ppl_bnn", "run", "--help", env={**known, "OMP_DISPLAY_ENV": "verbose"})
    assert "GOMP_SPINCOUNT = '3000'" in done.stderr


def test_the_recipes_are_the_run_folders_of_the_checkout():
    assert recipes().keys() == {path.parent.name for path in (ROOT / "runs").glob("*/config.yaml")}
    assert len(recipes()) >= 27


def test_a_recipes_results_go_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_of(Path("mnist-fc")) == recipes()["mnist-fc"]
    assert out_of(Path("mnist-fc")) == Path("runs/mnist-fc/out")
    # A folder of that name is not taken for the recipe.
    (tmp_path / "mnist-fc").mkdir()
    (tmp_path / "mnist-fc" / "config.yaml").write_text("device: cpu\n")
    assert config_of(Path("mnist-fc")) == Path("mnist-fc/config.yaml")
    assert out_of(Path("mnist-fc")) == Path("mnist-fc/out")


def test_a_name_that_is_neither_folder_nor_recipe(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, lines = call(run="mnist-cf")
    assert code == 2
    assert lines == [
        "error: there is no mnist-cf/config.yaml; give a folder with a config.yaml (here: none in runs/), or the name "
        "of a recipe (did you mean mnist-fc?)"
    ]
    assert did_you_mean("zzz", recipes()) == ""


def test_a_recipe_trains_and_resumes_by_its_name_alone(call, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["--data.dir", data_dir, "--data.num_train", 300, "--data.num_test", 50, "--train.epochs", 1]
    assert call("--stages", "train", *arguments, run="mnist-fc")[0] == 0
    assert (tmp_path / "runs" / "mnist-fc" / "out" / "checkpoints").is_dir()
    code, lines = call("--stages", "train", *arguments, run="mnist-fc")
    assert code == 0
    assert lines == ["train: complete already (1 epochs)"]


def source_files(folder):
    """The files of the project that git would keep, in a folder of their own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True,
        check=True,
    ).stdout.decode()  # fmt: skip
    for name in filter(None, listed.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)


def built(source, what):
    code = f"import setuptools.build_meta as build; print(build.build_{what}('..'))"
    done = python("-c", code, cwd=source)
    assert done.returncode == 0, done.stderr
    return source.parent / done.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_wheel_brings_the_command_and_the_recipes_to_any_folder(tmp_path, data_dir):
    pytest.importorskip("setuptools", minversion="68")
    if not (ROOT / ".git").exists():
        pytest.skip("the files of the project are listed by git")
    source = tmp_path / "source"
    source_files(source)
    # As a user gets it: the wheel that is built from the source distribution.
    archive = built(source, "sdist")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    wheel = built(unpacked, "wheel")
    site = tmp_path / "site"
    done = python("-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel.resolve())
    assert done.returncode == 0, done.stderr
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [site / "bin" / "ppl_bnn", "run", "mnist-fc", "--data.dir", data_dir, "--data.num_train", "300",
               "--data.num_test", "50", "--train.epochs", "1", "--predict.num_samples", "3", "--stages",
               "train,predict"]  # fmt: skip
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "runs" / "mnist-fc" / "out" / "predictive.nc").exists()
    found = python("-c", "import ppl_bnn; print(ppl_bnn.__file__)", cwd=elsewhere, env=environment)
    assert Path(found.stdout.strip()).is_relative_to(site)
