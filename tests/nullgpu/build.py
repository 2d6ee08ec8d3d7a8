"""Build the null GPU for the installed CUDA build of torch; print the folder that holds it.

    python build.py [FOLDER]

Under FOLDER (NULLGPU_FOLDER, or ``build`` beside this file) every version of torch and of these sources has a folder of
its own, so nothing stale is ever loaded. It is built under another name and renamed, so that processes which start at
the same time do not disturb one another. Needs cc and nm. The CUDA headers come with triton, which the CUDA build of
torch depends on.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
LIBRARIES = ("c10_cuda", "torch_cuda", "torch_python", "torch_cuda_linalg", "torch_nvshmem", "caffe2_nvrtc")
PREFIXES = r"(?:__)?(?:cuda|cublas|cudnn|cusparse|cufft|cusolver|curand|nccl)[A-Za-z]\w+|cu[A-Z]\w+"


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed: the null GPU serves a CUDA build of torch")
    return Path(next(iter(spec.submodule_search_locations)))


def obstacle() -> str | None:
    """Why the null GPU cannot be built here, in one line; None where it can."""
    for tool in ("cc", "nm"):
        if shutil.which(tool) is None:
            return f"the null GPU needs {tool}, which is not installed"
    if not (package("torch") / "lib/libtorch_cuda.so").exists():
        return f"the null GPU needs a CUDA build of torch, and {importlib.metadata.version('torch')} is none"
    if importlib.util.find_spec("triton") is None:
        return "the null GPU needs the CUDA headers that come with triton, which is not installed"
    return None


def undefined(library: Path) -> set[str]:
    """Symbols of CUDA that LIBRARY takes from elsewhere."""
    if not library.exists():
        return set()
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(rf"\bU ({PREFIXES})(?:@|$)", listing, flags=re.MULTILINE))


def defined(shared_object: Path) -> set[str]:
    """Symbols that SHARED_OBJECT offers."""
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", shared_object], capture_output=True, text=True, check=True
    ).stdout
    return {line.split()[-1] for line in listing.splitlines()}


def key() -> str:
    """What the library depends on: torch's version and where it lies, and the two sources."""
    digest = hashlib.sha256(str(package("torch")).encode())
    for source in (HERE / "nullgpu.c", HERE / "build.py"):
        digest.update(source.read_bytes())
    return f"torch-{importlib.metadata.version('torch')}-{digest.hexdigest()[:12]}{'-counted' if counted() else ''}"


def counted() -> list[str]:
    """What makes the compiler count calls, where that is asked for."""
    return ["-finstrument-functions"] if os.environ.get("NULLGPU_CALLS") else []


def build(root: Path) -> Path:
    """The folder under ROOT that holds the library, built if it is not there yet."""
    folder = root / key()
    if (folder / "libnullgpu.so").exists():
        return folder
    if (reason := obstacle()) is not None:
        raise SystemExit(reason)
    root.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="building-", dir=root))
    try:
        compile_into(work)
        work.chmod(0o755)
        try:
            work.rename(folder)
        except OSError:
            if not (folder / "libnullgpu.so").exists():  # otherwise another process was first, with the same library
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def compile_into(folder: Path) -> None:
    """Compile nullgpu.c, and stubs that answer 0 for every other entry point that torch or cuda.h names."""
    torch, include = package("torch"), package("triton") / "backends/nvidia/include"
    target, stubs = folder / "libnullgpu.so", folder / "stubs.c"
    cc = ["cc", "-O1", "-w", "-shared", "-fPIC", *counted(), f"-I{include}", HERE / "nullgpu.c", "-lpthread", "-ldl"]
    subprocess.run([*cc, "-o", target], check=True)
    wanted = {s for name in LIBRARIES for s in undefined(torch / f"lib/lib{name}.so")}
    header = (include / "cuda.h").read_text()
    wanted |= set(re.findall(r"CUresult CUDAAPI (cu\w+)\s*\(", header))
    wanted |= set(re.findall(r"#define cu\w+\s+(cu[A-Z]\w+_v\d)\b", header))
    missing = sorted(s for s in wanted - defined(target) if not s.startswith("cuFile"))
    stubs.write_text("".join(f"int {name}() {{ return 0; }}\n" for name in missing))
    subprocess.run([*cc, stubs, "-o", target], check=True)
    for alias in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (folder / alias).symlink_to(target.name)


if __name__ == "__main__":
    chosen = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("NULLGPU_FOLDER") or HERE / "build"
    print(build(Path(chosen)))
