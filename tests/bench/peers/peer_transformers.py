"""transformers as a peer. Usage: peer_transformers.py MODEL_DIR."""

import sys

import torch
from cells import answer_cells
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)


def run(prompts: list[list[int]], output: int) -> None:
    ids = torch.tensor(prompts)
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=output,
        min_new_tokens=output,
        do_sample=False,
    )


answer_cells(run)
