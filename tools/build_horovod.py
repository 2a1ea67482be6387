"""Build Horovod for the installed torch, keep the wheel, install it, and check that two ranks can add.

    make horovod                                   # some minutes, seconds where the wheel is kept already
    python tools/build_horovod.py --kept           # only where it is: what make test does
    python tools/build_horovod.py --gpu            # with NCCL even where no GPU is in sight (a login node)

Horovod's last release is older than today's torch, whose headers need C++20: the source release is built with that one
change. Gloo is always in; MPI where ``mpicxx`` is, NCCL where ``nvcc`` and a GPU are. Wheels are kept in
``$XDG_CACHE_HOME/ppl_bnn`` (~/.cache/ppl_bnn), one for each version of Horovod, torch and Python and each set of those.
"""

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

import torch

VERSION = "0.28.1"
SHA256 = "92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0"
# What Horovod's setup.py wants to import, and what it needs when it runs.
REQUIREMENTS = ("setuptools", "wheel", "packaging", "cloudpickle", "psutil", "pyyaml", "cffi")
WITHOUT = "Without Horovod, torchrun --nproc-per-node 2 -m ppl_bnn.run runs/<name> trains the same: torch.distributed."
ALLREDUCE = (
    "import torch, horovod.torch as hvd; hvd.init(); "
    "total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0]), op=hvd.Sum, name='check'); "
    "assert hvd.size() == 2 and total.item() == 3, (hvd.size(), total)"
)


def main() -> int:
    """Build, install and check; the exit code is 1, with what is missing and how to go on, where that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="build with NCCL even where no GPU is in sight")
    parser.add_argument("--kept", action="store_true", help="install a wheel that is kept already, but build none")
    options = parser.parse_args()
    mpi = shutil.which("mpicxx") is not None
    nccl = options.gpu or (torch.cuda.is_available() and shutil.which("nvcc") is not None)
    if options.kept and not kept(mpi=mpi, nccl=nccl):
        print("Horovod: no wheel is kept, its tests are skipped; make horovod builds one")
        return 0
    try:
        # A CMake that pip brings is found too.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        pip("install", *REQUIREMENTS, *[] if shutil.which("cmake") else ["cmake"])
        wheel = build(mpi=mpi, nccl=nccl)
        pip("install", "--force-reinstall", "--no-deps", str(wheel))
        check(mpi="-mpi" in wheel.parent.name)
    except BuildError as error:
        print(f"Horovod {VERSION}: {error}\n{WITHOUT}", file=sys.stderr)
        return 1
    return 0


def folder_of(*, mpi: bool, nccl: bool) -> Path:
    """Where the wheel for this torch, Python and set of libraries is kept."""
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    key = "-".join([VERSION, f"torch{torch.__version__}", python, "gloo", *["mpi"] * mpi, *["nccl"] * nccl])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppl_bnn" / f"horovod-{key}"


def kept(*, mpi: bool, nccl: bool) -> list[Path]:
    """The wheel, if it is there."""
    return sorted(folder_of(mpi=mpi, nccl=nccl).glob("*.whl"))


def build(*, mpi: bool, nccl: bool) -> Path:
    """Return the wheel, building it if it is not kept already."""
    folder = folder_of(mpi=mpi, nccl=nccl)
    if found := kept(mpi=mpi, nccl=nccl):
        print(f"kept from before: {found[0]}")
        return found[0]
    header = Path(sysconfig.get_path("include")) / "Python.h"
    needs = {
        "a C++ compiler (Debian: apt-get install g++)": shutil.which("c++") or shutil.which("g++"),
        "make (Debian: apt-get install make)": shutil.which("make"),
        f"{header} (Debian: apt-get install python3-dev)": header.exists(),
        "nvcc, for --gpu": shutil.which("nvcc") if nccl else True,
    }
    if missing := [name for name, there in needs.items() if not there]:
        raise BuildError(f"cannot be built here, missing: {'; '.join(missing)}")
    with tempfile.TemporaryDirectory() as temporary:
        environment = {
            **os.environ, "HOROVOD_WITH_PYTORCH": "1", "HOROVOD_WITHOUT_TENSORFLOW": "1", "HOROVOD_WITHOUT_MXNET": "1",
            "HOROVOD_WITH_GLOO": "1", "HOROVOD_WITH_MPI" if mpi else "HOROVOD_WITHOUT_MPI": "1",
            # CMake 4 refuses the Gloo inside otherwise.
            "MAKEFLAGS": f"-j{os.cpu_count()}", "CMAKE_POLICY_VERSION_MINIMUM": "3.5",
            **(nccl_settings(Path(temporary)) if nccl else {}),
        }  # fmt: skip
        source = unpack(Path(temporary))
        patch(source, cuda=nccl)
        print(f"building {folder.name}: some minutes", flush=True)
        pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", temporary, str(source), env=environment)
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(next(Path(temporary).glob("*.whl")), folder))


def nccl_settings(folder: Path) -> dict[str, str]:
    """The environment that builds with NCCL: torch's own, unless HOROVOD_NCCL_HOME names another or torch has none."""
    cuda = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    settings = {
        "HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "SHARED", "HOROVOD_CUDA_HOME": cuda, "CUDA_HOME": cuda,
        "CUDAARCHS": "OFF",  # Horovod's own list, which CMake would add to
    }  # fmt: skip
    homes = [Path(entry) / "nvidia" / "nccl" for entry in sys.path]
    home = next((home for home in homes if (home / "include" / "nccl.h").exists()), None)
    if home and "HOROVOD_NCCL_HOME" not in os.environ:
        # Linkers look for a name without a version, which torch's package lacks.
        (folder / "libnccl.so").symlink_to(home / "lib" / "libnccl.so.2")
        settings |= {"HOROVOD_NCCL_INCLUDE": str(home / "include"), "HOROVOD_NCCL_LIB": str(folder)}
    return settings


def unpack(folder: Path) -> Path:
    """Fetch the source release from the package index, verify it, and unpack it."""
    pip("download", "--no-binary", ":all:", "--no-deps", "--dest", str(folder), f"horovod=={VERSION}")
    archive = next(folder.glob("horovod-*.tar.gz"))
    if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256:
        raise BuildError(f"{archive.name} has SHA-256 {found}, expected {SHA256}: the download is damaged or altered")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / f"horovod-{VERSION}"


def patch(source: Path, *, cuda: bool) -> None:
    """torch's headers are C++20; without CUDA the probe for it is off, which a toolkit without a GPU would mislead."""
    changes = [
        ("CMakeLists.txt", r"CXX_STANDARD 14\)", "CXX_STANDARD 20)"),
        ("horovod/torch/CMakeLists.txt", r"CXX_STANDARD 14\)", "CXX_STANDARD 20)"),
        # Today's compilers for GPUs know no C++11 any more.
        ("horovod/common/ops/cuda/CMakeLists.txt", r"CUDA_STANDARD 11\)", "CUDA_STANDARD 17)"),
        *([] if cuda else [("cmake/Modules/FindPytorch.cmake", r"\(CUDA_HOME is not None\)", "False")]),
    ]
    for name, pattern, text in changes:
        content, count = re.subn(pattern, text, (source / name).read_text())
        assert count == 1, f"{pattern} is {count} times in {name}"
        (source / name).write_text(content)


def check(*, mpi: bool) -> None:
    """Print what Horovod was built with, and let two ranks add over every controller it has."""
    horovodrun = str(Path(sys.executable).parent / "horovodrun")
    print(run([horovodrun, "--check-build"], "its own check"))
    for name in ["gloo", *["mpi"] * mpi]:
        run([horovodrun, "-np", "2", f"--{name}", sys.executable, "-c", ALLREDUCE], f"two ranks over {name}")
        print(f"two ranks added over {name}", flush=True)


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Run this Python's pip."""
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], f"pip {arguments[0]}", env=env)


class BuildError(RuntimeError):
    """What went wrong, and what to do about it."""


def run(command: list[str], what: str, *, env: dict[str, str] | None = None) -> str:
    """Run a command and return its output."""
    try:
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600, check=True).stdout
    except subprocess.CalledProcessError as error:
        lines = (error.stdout + error.stderr).splitlines()
        # Compilers and CMake say what was wrong long before pip has finished with its traceback.
        output = "\n".join([line for line in lines if re.search(r"\b[Ee]rror\b", line)][:20] or lines[-20:])
        raise BuildError(f"{what} failed (exit code {error.returncode}):\n{output}") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{what} failed: {error}") from None


if __name__ == "__main__":
    sys.exit(main())
