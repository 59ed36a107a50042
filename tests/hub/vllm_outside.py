"""Serves an export with vLLM, in a process without the package; see `test_export_served`."""

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_CI_ENV": "1",  # no compiler
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # it needs Triton
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def main(asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The greedy tokens of each prompt, and their log-probabilities."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        asked["model"],
        model_impl="transformers",
        trust_remote_code=True,
        hf_overrides={"num_loops": asked["num_loops"]},
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_batched_tokens=8,  # prompts arrive in pieces
        max_num_seqs=4,
    )
    greedy = SamplingParams(
        temperature=0, max_tokens=asked["new"], logprobs=0, ignore_eos=True, detokenize=False
    )
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    found = []
    for answer in llm.generate(prompts, greedy):
        out = answer.outputs[0]
        tokens = list(out.token_ids)
        logs = [row[token].logprob for token, row in zip(tokens, out.logprobs, strict=True)]
        found.append({"tokens": tokens, "logs": logs})
    return found


if __name__ == "__main__":
    os.environ |= SETTINGS
    results = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(results))
