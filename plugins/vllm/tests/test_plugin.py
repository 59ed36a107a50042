"""vLLM with the plugin against `generate`; runs in the environment that `make vllm` makes."""

import os

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",  # else one of two cores is left to the scheduler
    "VLLM_CPU_CI_ENV": "1",  # no compiler
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import LLM, EngineArgs, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.exceptions import VLLMValidationError

from openmythos import OpenMythos
from openmythos.hub import export
from openmythos.inference import generation
from openmythos.model.config import MythosConfig
from openmythos.nn.cache import CachePolicy, ExactCache, FirstLoopCache
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.nn.value_embedding import GatedValueEmbeddings
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.initial_state import NormalState
from openmythos.recurrence.injections import Concat
from openmythos.recurrence.loop_lora import LoopLoRA

LENGTHS = (1, 3, 20, 33, 70)
MOST_LOOPS, NEW = 8, 12
PARTS: dict[str, dict[str, Any]] = {
    "grouped": {
        # A head of 24 numbers is one of 32 in vLLM.
        "attention": GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=24),
        "recurrent_feed_forward": SwiGLU(hidden_dim=48),
        "recurrent_layers": 2,
    },
    "latent": {
        "attention": LatentAttention(
            num_heads=4,
            kv_latent_dim=24,
            q_latent_dim=16,
            nope_head_dim=8,
            rope_head_dim=8,
            value_head_dim=12,
        ),
        "recurrent_feed_forward": MoE(num_experts=4, top_k=2, expert_dim=32, bias_loops=2),
        "loop_lora": LoopLoRA(rank=2, num_loops=4, targets=("*",)),
        "tie_embeddings": False,
    },
    "windowed": {
        "attention": GroupedQueryAttention(num_heads=2, num_kv_heads=2, head_dim=32, window=12),
        "recurrent_feed_forward": SwiGLU(hidden_dim=48),
        "injection": Concat(),
        "state_init": NormalState(),
        "value_embeddings": GatedValueEmbeddings(),
        "logit_softcap": 10.0,
        "logit_scale": 2.0,
    },
}


@dataclass(frozen=True)
class Answer:
    """Tokens, and the log-probabilities of the prompt's tokens after the first and of these."""

    tokens: list[int]
    logs: Tensor


@pytest.fixture(scope="module", params=PARTS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[OpenMythos, Path]:
    return make(tmp_path_factory.mktemp("export") / "model", **PARTS[request.param])


def make(folder: Path, **parts: Any) -> tuple[OpenMythos, Path]:
    """A model whose weights are all different from their initial values, and its export."""
    config = MythosConfig(
        vocab_size=50, dim=64, context=128, feed_forward=SwiGLU(hidden_dim=48), **parts
    )
    model = OpenMythos(config, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    biases = [x for name, x in model.named_buffers() if name.endswith("router_bias")]
    with torch.no_grad():
        for tensor in (*model.parameters(), *biases):
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    export.write(model, folder)
    return model, folder


def options(folder: Path, num_loops: int, **more: Any) -> dict[str, Any]:
    overrides = {"num_loops": num_loops} | more.pop("overrides", {})
    return {
        "model": str(folder),
        "hf_overrides": overrides,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "block_size": 32,
        "max_num_batched_tokens": 32,  # prompts arrive in pieces
        "max_num_seqs": 4,
        "enable_prefix_caching": False,
    } | more


@contextmanager
def engine(folder: Path, num_loops: int, **more: Any) -> Iterator[LLM]:
    llm = LLM(**options(folder, num_loops, **more))
    yield llm
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(50, (n,), generator=generator).tolist() for n in LENGTHS]


def asked(loops: int | None, *, whole: bool = True) -> SamplingParams:
    return SamplingParams(
        temperature=0,
        max_tokens=NEW,
        logprobs=0,
        prompt_logprobs=0 if whole else None,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if loops is None else {"num_loops": loops},
    )


def answers(llm: LLM, rows: list[list[int]], params: list[SamplingParams]) -> list[Answer]:
    given = [{"prompt_token_ids": row} for row in rows]
    found = []
    for out in llm.generate(given, params, use_tqdm=False):
        tokens = list(out.outputs[0].token_ids)
        said = [*zip(out.prompt_token_ids, out.prompt_logprobs or [], strict=False)][1:]
        said += zip(tokens, out.outputs[0].logprobs, strict=True)
        found.append(Answer(tokens, torch.tensor([row[token].logprob for token, row in said])))
    return found


def own(model: OpenMythos, row: list[int], loops: int, policy: CachePolicy) -> Answer:
    """What `generate` gives for one request alone."""
    request = generation.Request(
        max_new_tokens=NEW, num_loops=loops, prefill=policy, decode=policy, sampling=GREEDY
    )
    prompt = torch.tensor([row])
    steps = [step.tokens for step in generation.stream(model, prompt, request)]
    tokens = torch.stack(steps, dim=1)
    whole = torch.cat((prompt, tokens), dim=1)
    cache = model.new_cache(1, whole.shape[1], num_loops=loops, prefill=policy, decode=policy)
    with torch.no_grad():
        logs = model(whole, num_loops=loops, cache=cache).logits[0].log_softmax(-1)
    return Answer(tokens[0].tolist(), logs[:-1].gather(1, whole[0, 1:, None])[:, 0])


GREEDY = generation.Sampling(temperature=0.0)


def same(found: Answer, expected: Answer) -> None:
    assert found.tokens == expected.tokens
    torch.testing.assert_close(found.logs, expected.logs[-len(found.logs) :], atol=1e-4, rtol=1e-4)


def test_requests_with_loops_of_their_own(exported: tuple[OpenMythos, Path]) -> None:
    """Mixed lengths in pieces; four requests of different loops share a batch."""
    model, folder = exported
    rows = prompts()
    with engine(folder, MOST_LOOPS) as llm:
        for asks in ([1, 4, 8, 3, None], [None, 8, 1, 2, 4], [4] * 5):
            found = answers(llm, rows, [asked(loops) for loops in asks])
            for row, loops, answer in zip(rows, asks, found, strict=True):
                same(answer, own(model, row, loops or MOST_LOOPS, ExactCache()))
        with pytest.raises(
            VLLMValidationError, match="num_loops = 9: must be a whole number, 1 to 8"
        ):
            answers(llm, rows[:1], [asked(9)])


@pytest.mark.parametrize("num_loops", [1, 4])
def test_loops_of_the_engine_and_shared_prefixes(num_loops: int, tmp_path: Path) -> None:
    model, folder = make(tmp_path / "model", **PARTS["latent"])
    row = prompts()[-1]
    with engine(folder, num_loops, enable_prefix_caching=True) as llm:
        expected = own(model, row, num_loops, ExactCache())
        for _ in range(2):  # the second one reads what the first has left
            same(answers(llm, [row], [asked(None, whole=False)])[0], expected)
        if num_loops > 1:
            with pytest.raises(VLLMValidationError, match="--no-enable-prefix-caching"):
                answers(llm, [row], [asked(1)])


@pytest.mark.parametrize("name", ["latent", "windowed"])
def test_later_loops_read_the_first_ones_keys(name: str, tmp_path: Path) -> None:
    model, folder = make(tmp_path / "model", **PARTS[name])
    rows, asks = prompts(), [5, 2, None, 3, 1]
    with engine(folder, 5, overrides={"cache_policy": "first"}) as llm:
        found = answers(llm, rows, [asked(loops) for loops in asks])
    for row, loops, answer in zip(rows, asks, found, strict=True):
        same(answer, own(model, row, loops or 5, FirstLoopCache()))


@pytest.mark.parametrize(
    ("parts", "more", "words"),
    [
        ({"halting": ACT()}, {}, "halting = 'act': must be 'none'"),
        ({}, {"overrides": {"cache_policy": "last"}}, "cache_policy = 'last': must be 'exact' or"),
        ({}, {"quantization": "fp8"}, "quantization = 'fp8': is not supported"),
        ({}, {"pipeline_parallel_size": 2}, "pipeline_parallel_size = 2: must be 1"),
        ({}, {"enable_prompt_embeds": True}, "enable_prompt_embeds = True: is not supported"),
        (
            {},
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
            "speculative_config.method = 'ngram': is not supported",
        ),
        (
            {"attention": LatentAttention(kv_latent_dim=512, rope_head_dim=32)},
            {},
            "kv_latent_dim . rope_head_dim = 544: must be at most 512",
        ),
    ],
)
def test_what_is_refused(
    parts: dict[str, Any], more: dict[str, Any], words: str, tmp_path: Path
) -> None:
    _, folder = make(tmp_path / "model", **PARTS["grouped"] | parts)
    with pytest.raises(ValueError, match=words):
        EngineArgs(**options(folder, 2, **more)).create_engine_config()
