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
# A room may import the rooms named here, all of which stand below it, and the ground.
MAY_IMPORT = {
    "study": ("scaling", "experiment", "results", "models"),
    "scaling": (
        "experiment", "results", "pruning", "inference", "prediction", "data", "guides", "models", "distributed",
        "native",
    ),
    "experiment": (
        "results", "pruning", "inference", "prediction", "data", "guides", "models", "distributed", "native",
    ),
    "results": ("pruning", "inference", "prediction", "data", "guides", "models", "distributed", "native"),
    "pruning": ("inference", "prediction", "data", "guides", "models", "distributed", "native"),
    "inference": ("prediction", "data", "guides", "models", "distributed", "native"),
    "prediction": ("data", "guides", "models", "distributed", "native"),
    "data": ("native",),
    "guides": ("models", "native"),
    "models": ("distributed", "native"),
    "distributed": (),
    "native": (),
}  # fmt: skip
# They stand in front of the rooms: they import all, and nothing imports them.
COMMANDS = {"__main__", "run", "jobs", "export", "import_posterior", "scaling.__main__", "study.__main__"}
# These know nothing of files either, which are part of the ground.
PURE = (
    "models/*.py", "guides/*.py", "guides/estimators/*.py", "distributed/*.py", "pruning/criteria.py",
    "pruning/masks.py", "pruning/ratios.py", "inference/elbo.py", "*metrics.py",
)  # fmt: skip
IMPURE = {"ppl_bnn.files", "ppl_bnn.inference.checkpoint", "ppl_bnn.data.named"}
# The public entry points whose keywords are settings.
MANY_PARAMETERS = {"fit", "predict", "predict_shifted", "sweep"}
SOURCES = {
    str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")
}


def imports(source):
    """The modules that a file imports, anywhere in it; for ``from a import b`` both ``a`` and ``a.b``."""
    for node in ast.walk(SOURCES[source]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Of the package itself it is a module, or a public name, which is no room's to import.
            yield from [node.module] if node.module != "ppl_bnn" else []
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name):
    """The room that ``ppl_bnn.models.layers`` or ``models/layers.py`` is of; ``""`` for the package itself."""
    parts = name.removesuffix(".py").replace("/", ".").removeprefix("ppl_bnn").strip(".").split(".")
    return "" if parts[0] == "__init__" else parts[0]


def is_command(source):
    return source.removesuffix(".py").replace("/", ".") in COMMANDS


GROUND = {room_of(source) for source in SOURCES if "/" not in source and not is_command(source)} - {""}


@pytest.mark.parametrize("room", [*MAY_IMPORT, *sorted(GROUND)])
def test_imports_run_one_way(room):
    allowed = {room, *MAY_IMPORT.get(room, ()), *GROUND}
    upward = {
        f"{source} imports {name}"
        for source in SOURCES
        if room_of(source) == room and not is_command(source)
        for name in imports(source)
        if name.partition(".")[0] == "ppl_bnn" and room_of(name) not in allowed
    }
    assert not upward


def test_the_table_has_every_room_and_no_two_import_each_other():
    assert set(MAY_IMPORT) == {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    for place, allowed in enumerate(MAY_IMPORT.values()):
        assert set(allowed) <= set(list(MAY_IMPORT)[place + 1 :])


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_says_what_it_may_import(room):
    lines = ast.get_docstring(SOURCES[f"{room}/__init__.py"]).splitlines()
    assert lines[-1] == f"May import: {', '.join([*MAY_IMPORT[room], 'the ground'])}."


def test_nothing_imports_the_commands():
    commands = {f"ppl_bnn.{name}" for name in COMMANDS}
    assert not {source for source in SOURCES if commands & set(imports(source))}
    stages = {source for source in SOURCES if "ppl_bnn.experiment.stages" in imports(source)}
    assert stages == {"run.py"}


@pytest.mark.parametrize("path", [path for pattern in PURE for path in sorted(PACKAGE.glob(pattern))], ids=str)
def test_the_mathematics_knows_nothing_of_files(path):
    assert not IMPURE & set(imports(str(path.relative_to(PACKAGE))))


@pytest.mark.parametrize(
    ("library", "boundary"), [("arviz", "results/idata.py"), ("horovod", "distributed/horovod_backend.py")]
)
def test_only_one_file_knows_the_library(library, boundary):
    knowing = {source for source in SOURCES if any(n.split(".")[0].startswith(library) for n in imports(source))}
    assert knowing == {boundary}


def test_files_and_functions_are_read_on_a_few_screens():
    assert len([source for source in SOURCES if "/" not in source]) - 1 <= 16
    places = ("ppl_bnn", "tests", "benchmarks", "tools", "examples")
    files = [path for place in places for path in (ROOT / place).rglob("*.py")]
    assert not {str(path) for path in files if len(path.read_text(encoding="utf-8").splitlines()) > 300}
    long, many = set(), set()
    for source, tree in SOURCES.items():
        lines = (PACKAGE / source).read_text(encoding="utf-8").splitlines()
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            first = function.body[1 if ast.get_docstring(function) is not None else 0 :]
            code = lines[first[0].lineno - 1 : function.end_lineno] if first else []
            if sum(bool(line.strip()) and not line.strip().startswith("#") for line in code) > 80:
                long.add(f"{source}: {function.name}")
            if len(function.args.args + function.args.kwonlyargs) > 12:
                many.add(function.name)
    assert not long
    assert many <= MANY_PARAMETERS


def run_python(code, **options):
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_has_no_side_effects():
    run_python(
        "import os; before = dict(os.environ); import ppl_bnn, sys; assert 'torch' not in sys.modules; "
        "import ppl_bnn.run, pyro, torch; seed = torch.get_rng_state(); from ppl_bnn import *; "
        "assert torch.equal(seed, torch.get_rng_state()); assert not list(pyro.get_param_store().keys()); "
        "assert dict(os.environ) == before"
    )


def test_training_and_predicting_load_nothing_that_draws():
    run_python(
        "import ppl_bnn, sys; ppl_bnn.fit, ppl_bnn.predict; "
        "heavy = {'arviz', 'jsonargparse', 'matplotlib', 'pandas', 'scipy', 'torchmetrics', 'torchvision', 'xarray'}; "
        "assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()"
    )


def test_public_names_are_what_type_checkers_see():
    import ppl_bnn

    (checked,) = (node for node in SOURCES["__init__.py"].body if isinstance(node, ast.If))
    seen = {(node.module, alias.name) for node in checked.body for alias in node.names}
    assert seen == {(module, name) for module, names in ppl_bnn._HOMES.items() for name in names}
    assert sorted(ppl_bnn.__all__) == sorted({name for _, name in seen} | {"__version__"})
    for name in ppl_bnn.__all__:
        assert getattr(ppl_bnn, name) is not None
        assert name in dir(ppl_bnn)
    with pytest.raises(AttributeError, match="module 'ppl_bnn' has no attribute 'train'"):
        ppl_bnn.train  # noqa: B018


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU OpenMP on Linux")
@pytest.mark.parametrize(("given", "spins"), [({}, 3000), ({"OMP_WAIT_POLICY": "active"}, "[0-9]{5,}"),
                                              ({"GOMP_SPINCOUNT": "70"}, 70)])  # fmt: skip
def test_threads_of_a_command_wait_awake_for_a_short_time_unless_the_user_says_how(given, spins):
    known = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = {**known, "OMP_DISPLAY_ENV": "verbose", **given}
    # What OpenMP itself says it has read, when torch loads it.
    command = [sys.executable, "-m", "ppl_bnn.run", "--help"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert re.search(rf"GOMP_SPINCOUNT = '{spins}'", found.stderr), found.stderr


def readme_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


def test_the_readmes_example_runs(tmp_path, data_dir, monkeypatch):
    (example,) = readme_blocks("python")
    assert "from ppl_bnn import" in example
    assert len(example.strip().splitlines()) <= 20
    (tmp_path / "data").symlink_to(data_dir.resolve())
    quick = example.replace("epochs=5", "epochs=1").replace("num_samples=100", "num_samples=3")
    assert quick != example
    monkeypatch.chdir(tmp_path)
    exec(quick, {})
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
