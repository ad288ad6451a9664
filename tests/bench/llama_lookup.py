"""Prompt lookup of llama.cpp beside its own plain decoding: rates of the program `llama-lookup`.

Knows the program's flags and its last lines; knows nothing of arriero.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

_RATE = re.compile(r"decoded\s+(\d+) tokens in\s+[\d.]+ seconds, speed:\s+([\d.]+) t/s")
_LIMIT_S = 900.0


@dataclass(frozen=True, kw_only=True)
class LlamaLookup:
    """The program and a model.

    Attributes:
        program: path of `llama-lookup`.
        model: the GGUF file of the same model.
        threads: threads of a run.
    """

    program: Path
    model: Path
    threads: int

    def ratio(self, prompt: str, output: int, rounds: int) -> float:
        """Decode rate with lookup over the rate without, the median of rounds in turns."""
        ratios = []
        for number in range(rounds):
            rates = {}
            for drafted in (0, 16) if number % 2 else (16, 0):
                rates[drafted] = self._rate(prompt, output, drafted)
            ratios.append(rates[16] / rates[0])
        return round(statistics.median(ratios), 3)

    def _rate(self, prompt: str, output: int, drafted: int) -> float:
        """Tokens per second of a run with at most `drafted` drafted tokens in a step.

        Raises:
            RuntimeError: the program failed, or printed no rate.
        """
        command = [str(self.program), "-m", str(self.model), "-p", prompt, "-n", str(output)]
        command += ["-t", str(self.threads), "--spec-draft-n-max", str(drafted)]
        command += ["--temp", "0", "--ignore-eos"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S)
        printed = done.stdout + done.stderr
        rates = _RATE.findall(printed)
        if done.returncode or not rates:
            raise RuntimeError(
                f"{self.program}: exit code {done.returncode} and no decode rate; its last words: "
                f"{printed[-300:]!r}"
            )
        return float(rates[-1][1])
