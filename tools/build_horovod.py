"""Build Horovod for the installed torch, keep the wheel, install it, and check that two ranks can add.

    make horovod                                   # 5 minutes on 2 cores, seconds where the wheel is kept already
    python tools/build_horovod.py --gpu            # with NCCL even where no GPU is in sight (a login node)

Horovod's last release is older than today's torch, whose headers need C++20: the source release is built with that one
change. Gloo is always in; MPI where ``mpicxx`` is, NCCL where ``nvcc``, NCCL's header and a GPU are. Wheels are kept in
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
WITHOUT_HOROVOD = (
    "ppl_bnn works without Horovod: torchrun --nproc-per-node 2 -m ppl_bnn.run runs/<name> trains the same over "
    "torch.distributed (Gloo on CPUs, NCCL on GPUs)."
)
ALLREDUCE = (
    "import torch, horovod.torch as hvd; hvd.init(); "
    "total = hvd.allreduce(torch.tensor([hvd.rank() + 1.0]), op=hvd.Sum, name='check'); "
    "assert hvd.size() == 2 and total.item() == 3, (hvd.size(), total)"
)


def main() -> int:
    """Build, install and check; the exit code is 1, with what is missing and how to go on, where that fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", action="store_true", help="build with NCCL even where no GPU is in sight")
    gpu = parser.parse_args().gpu
    try:
        wheel = build(mpi=shutil.which("mpicxx") is not None, nccl=nccl_home() if gpu or has_gpu() else None)
        pip("install", "--force-reinstall", "--no-deps", str(wheel))
        check(mpi="-mpi" in wheel.parent.name)
    except BuildError as error:
        print(f"Horovod {VERSION}: {error}\n{WITHOUT_HOROVOD}", file=sys.stderr)
        return 1
    return 0


class BuildError(RuntimeError):
    """What went wrong, and what to do about it."""


def build(*, mpi: bool, nccl: Path | None) -> Path:
    """Return the wheel for this torch, Python and set of libraries, building it if it is not kept already."""
    parts = [VERSION, f"torch{torch.__version__}", f"py{sys.version_info.major}.{sys.version_info.minor}", "gloo"]
    key = "-".join([*parts, *["mpi"] * mpi, *["nccl"] * (nccl is not None)])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ppl_bnn" / f"horovod-{key}"
    pip("install", *REQUIREMENTS)
    if kept := sorted(folder.glob("*.whl")):
        print(f"kept from before: {kept[0]}")
        return kept[0]
    if missing := missing_tools():
        raise BuildError(f"cannot be built here, missing: {'; '.join(missing)}")
    environment = {
        **os.environ, "HOROVOD_WITH_PYTORCH": "1", "HOROVOD_WITHOUT_TENSORFLOW": "1", "HOROVOD_WITHOUT_MXNET": "1",
        "HOROVOD_WITH_GLOO": "1", "HOROVOD_WITH_MPI" if mpi else "HOROVOD_WITHOUT_MPI": "1",
        "MAKEFLAGS": f"-j{os.cpu_count()}", "CMAKE_POLICY_VERSION_MINIMUM": "3.5",  # CMake 4 refuses the Gloo inside
    }  # fmt: skip
    if nccl is not None:
        environment |= {
            "HOROVOD_GPU_OPERATIONS": "NCCL", "HOROVOD_NCCL_LINK": "SHARED",
            "HOROVOD_NCCL_INCLUDE": str(nccl / "include"), "HOROVOD_NCCL_LIB": str(nccl / "lib"),
        }  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        source, wheels = unpack(Path(temporary)), Path(temporary) / "wheels"
        patch(source, cuda=nccl is not None)
        print(f"building {key}: some minutes")
        pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(wheels), str(source), env=environment)
        folder.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(next(wheels.glob("*.whl")), folder))


def missing_tools() -> list[str]:
    """What a build needs and this machine lacks."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    found = {
        "a C++ compiler (Debian: apt-get install g++)": shutil.which("c++") or shutil.which("g++"),
        "CMake 3.13 or newer (pip install cmake)": shutil.which("cmake"),
        "make (Debian: apt-get install make)": shutil.which("make"),
        f"{header} (Debian: apt-get install python3-dev)": header.exists(),
    }
    return [name for name, there in found.items() if not there]


def has_gpu() -> bool:
    """Whether torch sees a GPU and a CUDA compiler is there to build for it."""
    return torch.cuda.is_available() and shutil.which("nvcc") is not None


def nccl_home() -> Path | None:
    """A folder with include/nccl.h and lib/libnccl.so: the system's, or torch's own NCCL; None where there is none."""
    places = [Path(os.environ.get("HOROVOD_NCCL_HOME", "/usr")), Path("/usr/local/cuda"), Path("/usr")]
    places += [Path(entry) / "nvidia" / "nccl" for entry in sys.path]
    return next((place for place in places if (place / "include" / "nccl.h").exists()), None)


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
    """torch's headers are C++20; without CUDA the probe for it is off, which a driverless toolkit would mislead."""
    for name in ("CMakeLists.txt", "horovod/torch/CMakeLists.txt"):
        replace(source / name, r"set\(CMAKE_CXX_STANDARD 14\)", "set(CMAKE_CXX_STANDARD 20)")
    if cuda:
        # Today's compilers for GPUs know no C++11 any more.
        replace(source / "horovod/common/ops/cuda/CMakeLists.txt", r"CUDA_STANDARD 11\)", "CUDA_STANDARD 17)")
    else:
        replace(source / "cmake/Modules/FindPytorch.cmake", r"\(CUDA_HOME is not None\)", "False")


def replace(path: Path, pattern: str, text: str) -> None:
    """Replace what must be there."""
    content, count = re.subn(pattern, text, path.read_text())
    assert count, f"{pattern} is not in {path}"
    path.write_text(content)


def check(*, mpi: bool) -> None:
    """Print what Horovod was built with, and let two ranks add over every controller it has."""
    horovodrun = str(Path(sys.executable).parent / "horovodrun")
    run([horovodrun, "--check-build"], "its own check")
    for controller in ["--gloo", *["--mpi"] * mpi]:
        run([horovodrun, "-np", "2", controller, sys.executable, "-c", ALLREDUCE], f"two ranks over {controller[2:]}")
        print(f"two ranks added over {controller[2:]}")


def pip(*arguments: str, env: dict[str, str] | None = None) -> None:
    """Run this Python's pip, quietly."""
    run([sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments], f"pip {arguments[0]}", env=env)


def run(command: list[str], what: str, *, env: dict[str, str] | None = None) -> None:
    """Run a command; its output is shown where it fails, and for --check-build."""
    try:
        result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{what} failed: {error}") from None
    output = result.stdout + result.stderr
    if result.returncode:
        raise BuildError(f"{what} failed (exit code {result.returncode}); the end of its output:\n{output[-4000:]}")
    if "--check-build" in command:
        print(result.stdout)


if __name__ == "__main__":
    sys.exit(main())
