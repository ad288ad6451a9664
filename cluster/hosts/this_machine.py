"""Resources of this machine, as Ray will report them once a cluster runs here.

`arriero up` checks a spec against this machine before it starts a local cluster. Knows the files of
Linux; knows nothing of Ray and of specs' models.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from arriero.cluster.spec.deployment import RaySpec

_GPU_MODEL = re.compile(r"Model:\s+\w+\s+([A-Z0-9]+)")
_DRIVER = Path("/proc/driver/nvidia/gpus")
_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


def resources(spec: RaySpec) -> dict[str, float]:
    """CPUs, GPUs with their types, and bytes of memory.

    Args:
        spec: of the local cluster that `up` would start.
    """
    node: dict[str, float] = {
        "CPU": spec.num_cpus or len(os.sched_getaffinity(0)),
        "memory": memory_bytes(),
    }
    types = gpu_types()
    if types:
        node["GPU"] = len(types)
        node |= {f"accelerator_type:{name}": 1.0 for name in types if name}
    return node


def memory_bytes() -> float:
    """Memory of this machine, or of this container where that is less."""
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for path in _CGROUP_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(float(text))
    return min(limits)


def gpu_types() -> list[str]:
    """Type of each visible GPU, such as "H100"; "" where the driver does not tell."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return []
    devices = [path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()]
    count = len(devices) if visible is None else min(len(devices), len(visible.split(",")))
    models = []
    for path in sorted(_DRIVER.glob("*/information")):
        try:
            match = _GPU_MODEL.search(path.read_text())
        except OSError:
            match = None
        models.append(match[1] if match else "")
    return [models[index] if index < len(models) else "" for index in range(count)]
