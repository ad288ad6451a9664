"""How fast a checkpoint loads into a packed slice, beside `cat FILE >/dev/null` of the same bytes.

Usage: load.py [--model MODEL_DIR | --gigabytes 6 --folder DIR] [--rounds 5] [--threads 2]

Without a model, one of random bytes in Llama's shape is written to DIR and kept for the next time.
A round times, with the file in the page cache ("warm") and then after it was dropped ("cold"):

- cat: `cat FILE >/dev/null`, which uses one small buffer over and over;
- floor: threads that read the file straight into fresh memory and do nothing else, which is what
  a loader does at the least;
- load: the slice, in a process of its own.

Last come the medians. The file is dropped anew before each of them that is to find it cold.

A virtual machine may get memory from its host as it is first touched, slower than any disk, and
give it back within seconds of being freed. So that this is not what is measured, a process of its
own holds all free memory, touched, and frees it as it is used (--ballast; nothing else of weight
should run on the machine then).
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from arriero.kernels.cpu.weights import large_zeros
from arriero.shards.checkpoint.formats.describe import read_settings
from arriero.shards.checkpoint.formats.stored import tensor_specs
from arriero.shards.checkpoint.index import SINGLE_FILE
from arriero.shards.checkpoint.reader import Checkpoint
from arriero.shards.checkpoint.safetensors_header import DTYPES, make_header
from arriero.shards.config.group import GroupConfig
from arriero.shards.layout.resolve import resolve
from arriero.shards.worker.select import runner_for

PIECE = 32 << 20
_POPULATE_WRITE = 23  # Python's mmap module does not name it
STATES = ("warm", "cold")
BALLAST_PIECE = 256 << 20
KEPT_FREE = 1 << 30
FIGURES = ("cat", "floor", "load")


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
    due = tensor_specs(*read_settings(settings))
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
    started = time.perf_counter()
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *files], stdout=nowhere, check=True)
    return time.perf_counter() - started


def floor_s(files: list[Path], threads: int) -> float:
    """Seconds in which threads read the files into fresh memory, a share of each file each."""
    started = time.perf_counter()
    for file in files:
        size = file.stat().st_size
        target = memoryview(large_zeros(size).numpy())
        share = -(-size // threads)
        with file.open("rb") as stream:

            def read(
                start: int, stop: int, to: memoryview = target, of: int = stream.fileno()
            ) -> None:
                while start < stop:
                    start += os.preadv(of, [to[start : min(stop, start + PIECE)]], start)

            bounds = [(at, min(size, at + share)) for at in range(0, size, share)]
            working = [threading.Thread(target=read, args=one) for one in bounds]
            for thread in working:
                thread.start()
            for thread in working:
                thread.join()
    return time.perf_counter() - started


def hold() -> None:
    """Hold what memory is free, touched, and give it as it gets used.

    What was freed meanwhile is taken back for each line that comes in, which one goes out for.
    """
    Path("/proc/self/oom_score_adj").write_text("1000")  # should memory run short, end this first
    pieces: list[mmap.mmap] = []
    while True:
        if select.select([sys.stdin], [], [], 0.003)[0]:
            if not sys.stdin.buffer.readline():
                return
            while free_bytes() > KEPT_FREE + 2 * BALLAST_PIECE:
                pieces.append(mmap.mmap(-1, BALLAST_PIECE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
                pieces[-1].madvise(mmap.MADV_HUGEPAGE)
                pieces[-1].madvise(_POPULATE_WRITE)
            print(len(pieces) * BALLAST_PIECE, flush=True)
        while pieces and free_bytes() < KEPT_FREE:
            pieces.pop().close()


def free_bytes() -> int:
    """Memory that nothing uses, the page cache counted as use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemFree:"))


@contextmanager
def ballast(wanted: bool) -> Iterator[Callable[[], None]]:
    """Gives what has touched memory at hand, called before each figure."""
    if not wanted:
        yield lambda: None
        return
    command = [sys.executable, __file__, "--only", "ballast"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as held:
        asked, told = held.stdin, held.stdout
        assert asked is not None and told is not None

        def settle() -> None:
            asked.write(b"\n")
            asked.flush()
            told.readline()

        yield settle
        asked.close()  # it ends by that


def memory_kb(field: str) -> int:
    """A figure of this process, such as VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def load(model: str, threads: int) -> dict[str, Any]:
    """Load in this process; seconds, and bytes held beyond the slice at the peak."""
    config = GroupConfig(model_path=model, num_blocks=16, max_model_len=256, threads=threads)
    config = resolve(config, Checkpoint.open(model).config)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, used = memory_kb("VmRSS"), resource.getrusage(resource.RUSAGE_SELF)
    runner = runner_for(config, 0)
    after = resource.getrusage(resource.RUSAGE_SELF)
    beyond = (memory_kb("VmHWM") - before) * 1024 - runner.weights_nbytes
    return {
        "seconds": runner.load_s,
        "slice_bytes": runner.weights_nbytes,
        "kv_bytes": runner.kv_nbytes,
        "peak_beyond_slice_bytes": beyond,
        "user_s": after.ru_utime - used.ru_utime,
        "system_s": after.ru_stime - used.ru_stime,
    }


def in_process(args: list[str]) -> dict[str, Any]:
    """This script in a process of its own."""
    command = [sys.executable, __file__, *args]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    state: str, what: str, model: str, files: list[Path], settle: Callable[[], None], threads: int
) -> dict[str, Any]:
    """One figure of one round: at least its seconds."""
    make_state(state, files)
    settle()
    if what == "cat":
        return {"seconds": cat_s(files)}
    return in_process(["--only", what, "--model", model, "--threads", str(threads)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--gigabytes", type=float, default=6.0)
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--ballast", action="store_true")
    parser.add_argument("--state", choices=STATES, action="append")
    parser.add_argument("--only", choices=("load", "floor", "ballast"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only == "ballast":
        hold()
        return
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
    if args.only == "floor":
        print(json.dumps({"seconds": floor_s(files, args.threads)}))
        return
    num_bytes = sum(file.stat().st_size for file in files)
    found: dict[str, list[dict[str, float]]] = {}
    with ballast(args.ballast) as settle:
        for at, state in product(range(args.rounds), args.state or STATES):
            made = {
                what: measure(state, what, model, files, settle, args.threads) for what in FIGURES
            }
            line = {f"{what}_gb_s": num_bytes / made[what]["seconds"] / 1e9 for what in FIGURES}
            loaded = made["load"]
            line |= {
                "load_of_cat": line["load_gb_s"] / line["cat_gb_s"],
                "load_of_floor": line["load_gb_s"] / line["floor_gb_s"],
                "floor_of_cat": line["floor_gb_s"] / line["cat_gb_s"],
                "peak_beyond_slice_mb": loaded["peak_beyond_slice_bytes"] / 1e6,
                "user_s": loaded["user_s"],
                "system_s": loaded["system_s"],
            }
            found.setdefault(state, []).append(line)
            say({"state": state, "round": at} | line)
    for state, lines in found.items():
        medians = {name: statistics.median(one[name] for one in lines) for name in lines[0]}
        say({"state": state, "median_of": len(lines)} | medians)


def say(line: dict[str, Any]) -> None:
    """As JSON, figures to three digits."""
    rounded = {k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()}
    print(json.dumps(rounded), flush=True)


if __name__ == "__main__":
    main()
