"""OpenVINO GenAI's continuous batching as a peer. Usage: peer_openvino.py EXPORTED_DIR."""

import sys

import numpy as np
import openvino
import openvino_genai
from cells import answer_cells

scheduler = openvino_genai.SchedulerConfig()
scheduler.cache_size = 2  # GiB
scheduler.max_num_batched_tokens = 2048
scheduler.max_num_seqs = 64
scheduler.dynamic_split_fuse = True
pipeline = openvino_genai.ContinuousBatchingPipeline(
    sys.argv[1], scheduler_config=scheduler, device="CPU", properties={}
)


def run(prompts: list[list[int]], output: int) -> None:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = output
    config.ignore_eos, config.do_sample = True, False
    handles = [
        pipeline.add_request(number, openvino.Tensor(np.array([ids], dtype=np.int64)), config)
        for number, ids in enumerate(prompts)
    ]
    while pipeline.has_non_finished_requests():
        pipeline.step()
    assert all(len(handle.read_all()[0].generated_ids) == output for handle in handles)


answer_cells(run)
