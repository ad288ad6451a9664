"""How fast a checkpoint loads into a packed slice, beside `cat FILE >/dev/null` of the same bytes.

Usage: load.py [--model MODEL_DIR | --gigabytes 6 --folder DIR] [--runs 3] [--threads 2]

Without a model, one of random bytes in Llama's shape is written to DIR and kept for the next time.
Both are timed with the file in the page cache ("warm") and after it was dropped ("cold"), each
load in a process of its own. "copy" is what the memory allows a loader at most: two threads that
copy the file's map into fresh memory, and do nothing else.

A virtual machine may get its memory from the host only as it is first touched, slower than any
disk, and give it back when it lies idle: each process touches and frees what it needs just before.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from arriero.kernels.cpu.weights import large_zeros
from arriero.shards.checkpoint.formats.describe import read_settings
from arriero.shards.checkpoint.formats.stored import tensors_due
from arriero.shards.checkpoint.index import SINGLE_FILE
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import DTYPES, make_header
from arriero.shards.group import GroupConfig
from arriero.shards.resolve import resolve
from arriero.shards.runner import runner_for

PIECE = 32 << 20
_POPULATE_WRITE = 23  # Python's mmap module does not name it
STATES = ("warm", "cold")


def settings_of(gigabytes: float) -> dict[str, Any]:
    """Layers as wide as an 8B model's, as many as make the size."""
    layer = 2 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    tables = 2 * 2 * 48_000 * 4096
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 48_000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": max(1, round((gigabytes * 1e9 - tables) / layer)),
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def write_model(folder: Path, gigabytes: float) -> None:
    """One file of random bytes, on the disk when this returns."""
    settings = settings_of(gigabytes)
    due = tensors_due(*read_settings(settings))
    piece = os.urandom(PIECE)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / SINGLE_FILE).open("wb") as stream:
        stream.write(make_header({one.name: (DTYPES[one.dtypes[0]], one.shape) for one in due}))
        left = sum(one.nbytes for one in due)
        while left:
            left -= stream.write(piece[: min(left, len(piece))])
        os.fsync(stream.fileno())
    (folder / "config.json").write_text(json.dumps(settings))


def make_state(state: str, files: list[Path]) -> None:
    """Have the files in the page cache, or out of it."""
    for file in files:
        if state == "warm":
            subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
            continue
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cat_s(files: list[Path]) -> float:
    """Seconds of `cat` of all files."""
    touch(sum(file.stat().st_size for file in files))  # the page cache's memory
    started = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *files], stdout=nowhere, check=True)
    return time.perf_counter() - started


def copy_s(files: list[Path]) -> float:
    """Seconds in which two threads copy the files' maps into fresh memory."""
    folder = Checkpoint.open(files[0].parent)
    sources = [folder.data(file) for file in files]
    touch(sum(len(source) for source in sources))
    started = time.perf_counter()
    for source in sources:
        target = large_zeros(source.numel())
        half = source.numel() // 2

        def copy(start: int, stop: int, to: Tensor = target, of: Tensor = source) -> None:
            for at in range(start, stop, PIECE):
                to[at : min(stop, at + PIECE)].copy_(of[at : min(stop, at + PIECE)])

        threads = [
            threading.Thread(target=copy, args=(a, b)) for a, b in ((0, half), (half, len(source)))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return time.perf_counter() - started


def touch(num_bytes: int) -> list[float]:
    """Touch as much memory and give it back, twice; bytes a second of both."""
    rates = []
    for _ in range(2):
        started = time.perf_counter()
        room = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room.madvise(mmap.MADV_HUGEPAGE)
        room.madvise(_POPULATE_WRITE)
        rates.append(num_bytes / (time.perf_counter() - started))
        room.close()
    return rates


def memory_kb(field: str) -> int:
    """A figure of this process, such as VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def load(model: str, threads: int) -> dict[str, Any]:
    """Load in this process; seconds, and bytes held beyond the slice at the peak."""
    config = GroupConfig(model_path=model, num_blocks=16, max_model_len=256, threads=threads)
    config = resolve(config, Checkpoint.open(model).config)
    # as much again for the page cache, where that is to be filled
    touched = touch(2 * Checkpoint.open(model).nbytes + (1 << 30))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory_kb("VmRSS")
    runner = runner_for(config, 0)
    beyond = (memory_kb("VmHWM") - before) * 1024 - runner.weights_nbytes
    return {
        "seconds": runner.load_s,
        "slice_bytes": runner.weights_nbytes,
        "kv_bytes": runner.kv_nbytes,
        "peak_beyond_slice_bytes": beyond,
        "touched": touched,
    }


def in_process(args: list[str]) -> dict[str, Any]:
    """This script in a process of its own."""
    command = [sys.executable, __file__, *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--only", choices=("load", "copy"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    model = args.model
    if model is None:
        folder = Path(args.folder) / f"load-{args.gigabytes:g}"
        if not (folder / "config.json").exists():
            write_model(folder, args.gigabytes)
        model = str(folder)
    files = list(Checkpoint.open(model).files)
    if args.only == "load":
        print(json.dumps(load(model, args.threads)))
        return
    if args.only == "copy":
        print(json.dumps({"seconds": copy_s(files)}))
        return
    num_bytes = sum(file.stat().st_size for file in files)
    for state in STATES:
        for run in range(args.runs):
            make_state(state, files)
            cat = cat_s(files)
            make_state(state, files)
            loaded = in_process(
                ["--only", "load", "--model", model, "--threads", str(args.threads)]
            )
            line = {
                "state": state,
                "run": run,
                "cat_gb_s": num_bytes / cat / 1e9,
                "load_gb_s": num_bytes / loaded["seconds"] / 1e9,
                "ratio": cat / loaded["seconds"],
                "load_s": loaded["seconds"],
                "peak_beyond_slice_mb": loaded["peak_beyond_slice_bytes"] / 1e6,
                "touched_gb_s": [round(one / 1e9, 3) for one in loaded["touched"]],
            }
            if state == "warm":
                copied = in_process(["--only", "copy", "--model", model])["seconds"]
                line["copy_gb_s"] = num_bytes / copied / 1e9
            print(
                json.dumps(
                    {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
