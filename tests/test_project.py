"""The project holds its own rules: imports run one way, and the README tells the truth."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ppl_bnn"
# These know nothing of settings, files or the command line.
PURE = (
    "models/*.py", "guides/*.py", "pruning/snr.py", "pruning/prune.py", "pruning/criteria.py", "metrics.py", "elbo.py",
    "distributed/*.py",
)  # fmt: skip
IMPURE = {
    "ppl_bnn.experiment.config",
    "ppl_bnn.experiment.config_check",
    "ppl_bnn.experiment.saved_config",
    "ppl_bnn.run",
    "ppl_bnn.experiment.stages",
    "ppl_bnn.experiment.setup",
    "ppl_bnn.files",
    "ppl_bnn.inference.checkpoint",
    "ppl_bnn.data.images",
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", [path for pattern in PURE for path in PACKAGE.glob(pattern)], ids=str)
def test_the_mathematics_knows_nothing_of_settings_and_files(path):
    assert not IMPURE & set(imports(path))


def test_only_one_file_knows_arviz():
    knowing = {
        path.name
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0].startswith("arviz") for name in imports(path))
    }
    assert knowing == {"idata.py"}


def test_only_one_file_knows_horovod():
    knowing = {path.name for path in PACKAGE.rglob("*.py") if any(n.split(".")[0] == "horovod" for n in imports(path))}
    assert knowing == {"horovod_backend.py"}


def test_nothing_imports_the_command_line_or_the_stages():
    for path in PACKAGE.rglob("*.py"):
        found = set(imports(path))
        assert "ppl_bnn.run" not in found
        assert path.name == "run.py" or "ppl_bnn.experiment.stages" not in found


def test_importing_the_package_has_no_side_effects_but_how_openmp_waits():
    code = (
        "import pyro, torch; seed = torch.get_rng_state(); import ppl_bnn; "
        "assert torch.equal(seed, torch.get_rng_state()); assert not list(pyro.get_param_store().keys())"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU OpenMP on Linux")
@pytest.mark.parametrize(("given", "spins"), [({}, 3000), ({"OMP_WAIT_POLICY": "active"}, "[0-9]{5,}"),
                                              ({"GOMP_SPINCOUNT": "70"}, 70)])  # fmt: skip
def test_threads_wait_awake_for_a_short_time_unless_the_user_says_how(given, spins):
    known = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = {**known, "OMP_DISPLAY_ENV": "verbose", **given}
    # What OpenMP itself says it has read, when torch loads it.
    found = subprocess.run([sys.executable, "-c", "import ppl_bnn"], env=environment, capture_output=True, text=True)
    assert re.search(rf"GOMP_SPINCOUNT = '{spins}'", found.stderr), found.stderr


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_readmes_example_runs(tmp_path, data_dir):
    (example,) = readme_blocks("python")
    assert "from ppl_bnn import" in example
    assert len(example.strip().splitlines()) <= 20
    (tmp_path / "data").symlink_to(data_dir.resolve())
    quick = example.replace("epochs=5", "epochs=1").replace("num_samples=100", "num_samples=3")
    assert quick != example
    subprocess.run([sys.executable, "-c", quick], cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "predictive.nc").exists()


def test_the_readmes_commands_name_what_is_there():
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"runs/([\w-]+)", text):
        assert (ROOT / "runs" / name / "config.yaml").exists(), name
    for name in re.findall(r"\]\((docs/[\w./-]+|[\w.]+\.\w+)\)", text):
        assert (ROOT / name).exists(), name


# ArviZ 0.23 announces its refactoring, and calls matplotlib 3.11 in a way that is to go in 3.13.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::matplotlib.MatplotlibDeprecationWarning")
def test_the_docs_page_on_results_runs(tmp_path, data_dir, monkeypatch, capsys):
    import matplotlib as mpl

    from ppl_bnn.run import main

    mpl.use("Agg")
    arguments = ["--out", tmp_path, "--data.dir", data_dir, "--data.num_train", 300, "--data.num_test", 40, "--quiet"]
    arguments += ["--train.epochs", 1, "--predict.num_samples", 20, "--pruning.num_samples", 5]
    assert main([str(ROOT / "runs" / "mnist-fc"), "--stages", "train,predict,prune", *map(str, arguments)]) == 0
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "results.md").read_text(), flags=re.DOTALL)
    assert len(blocks) == 2
    exec("\n".join(blocks), {})
    assert "50.0% pruned" in capsys.readouterr().out
