"""Build the null GPU: libnull.so, which is preloaded, and libcuda.so.1, for the torch of this environment.

    python -m tests.nullgpu.build python -m tests.nullgpu.measure --preset small   # builds it and runs the rest

NULLGPU_GIB (40) is the card's memory, NULLGPU_CAPABILITY (80, 89 or 90) its kind: A100, RTX 4090 or H100.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

SOURCES = Path(__file__).parent
BUILT = SOURCES / "built"
FLAGS = ("-std=gnu11", "-O1", "-shared", "-fPIC")
# Libraries of torch that call CUDA, and what they import of it.
CALLERS = ("c10_cuda", "torch_cuda", "torch_python", "torch_cuda_linalg", "torch_nvshmem")
OF_CUDA = re.compile(r"(?:cuda[A-Z]|__cuda|cublas|cusolver|cusparse[A-Z]|cufft|cudnn[A-Z])\w*")
DEFINED = re.compile(r"EXPORT [\w* ]*?(\w+)\(|^PRODUCT\((\w+)\)", re.MULTILINE)
DECLARED = re.compile(r"\bCUDAAPI\s+(cu\w+)\s*\(|\b(cu[A-Z]\w+_v\d)\b")


def has_cuda_wheel() -> bool:
    """Whether this environment has torch with its CUDA libraries."""
    torch = find_spec("torch")
    return torch is not None and (Path(str(torch.origin)).parent / "lib/libtorch_cuda.so").exists()


def build(folder: Path = BUILT) -> Path:
    """Build both libraries, unless they are there and newer than their sources; return the folder."""
    sources = [*SOURCES.glob("*.[ch]"), Path(__file__)]
    targets = [folder / "libnull.so", folder / "libcuda.so.1"]
    newest = max(source.stat().st_mtime for source in sources)
    if all(target.exists() and target.stat().st_mtime > newest for target in targets):
        return folder
    folder.mkdir(exist_ok=True)
    packages = Path(str(find_spec("torch").origin)).parent.parent  # type: ignore[union-attr]
    header = packages / "triton/backends/nvidia/include"
    libraries = [packages / f"torch/lib/lib{name}.so" for name in CALLERS]
    symbols = _run("nm", "-D", "--undefined-only", *filter(Path.exists, libraries))
    imported = {name for name in re.findall(r"U (\w+)", symbols) if OF_CUDA.fullmatch(name)}
    declared = {name for names in DECLARED.findall((header / "cuda.h").read_text()) for name in names} - {""}
    for target, names, parts in (
        (targets[0], imported, ("runtime.c", "blas.c")),
        (targets[1], declared, ("driver.c",)),
    ):
        ours = [SOURCES / part for part in parts]
        rest = folder / f"{target.stem}_rest.c"
        defined = {name for source in ours for names in DEFINED.findall(source.read_text()) for name in names}
        # Whatever else is asked for succeeds and does nothing.
        rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names - defined)))
        soname = f"-Wl,-soname,{target.name}"
        _run("gcc", *FLAGS, soname, "-o", target, f"-I{header}", *ours, rest, "-ldl", "-lpthread")
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Return the environment variables of a process that is to see the null GPU."""
    return {
        **os.environ,
        "LD_PRELOAD": str(folder / "libnull.so"),
        "LD_LIBRARY_PATH": str(folder),
        "TRITON_LIBCUDA_PATH": str(folder),
        "OMP_NUM_THREADS": "1",
    }


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    if not has_cuda_wheel():
        sys.exit("torch of this environment is not built for CUDA: make nullgpu installs one that is")
    os.execvpe(sys.argv[1], sys.argv[1:], environment(build()))
