"""vLLM serves packed checkpoints; skipped where it is not installed, as `tools/try_vllm.sh` does it."""

import gc
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM

import w2a4
from support.families import tiny_family

vllm = pytest.importorskip("vllm", reason="vllm is not installed; tools/try_vllm.sh")

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}  # fmt: skip

#: Tokens of a prompt that are held to transformers' log-probabilities one by one. Later ones need not agree:
#: sums are in another order, a 4-bit code is another sooner or later, and all behind it changes.
STEPS = 6


def checkpoint(path, family="llama", case="plain", shape=None, **recipe):
    """A tiny model of a family, quantised and saved; its directory."""
    model = tiny_family(family, case, **{"vocab_size": 300, "hidden_size": 96, **(shape or {})})
    settings = {"weight_method": "rtn", "calib_samples": 2, "calib_seqlen": 32, **recipe}
    chosen = w2a4.Recipe.load("w2a4kv4").override(**settings)
    windows = torch.randint(3, 300, (4, 64))
    w2a4.quantize(model, None, chosen, windows, progress=False)
    model.save_pretrained(path)
    return str(path)


def ids_of(count, seed=0):
    return torch.randint(3, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


class Served:
    """The checkpoint in vLLM, in this process, in float32 and without a tokenizer; a context manager."""

    def __init__(self, directory, **options):
        settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "max_num_seqs": 8,
                    "skip_tokenizer_init": True, "gpu_memory_utilization": 0.2, "seed": 0}  # fmt: skip
        try:
            self.llm = vllm.LLM(directory, **settings | options)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self):
        return self

    def __exit__(self, *error):
        """Nothing may hold the engine when process groups are destroyed: it would destroy the next one's."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm = None
        gc.collect()
        cleanup_dist_env_and_memory()

    def answers(self, prompts, tokens=1):
        """Log-probabilities of the tokens of each prompt but the first, and what is generated behind it."""
        sampling = vllm.SamplingParams(temperature=0, max_tokens=tokens, prompt_logprobs=0, ignore_eos=True)
        found = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        return [
            (
                torch.tensor([next(iter(token.values())).logprob for token in one.prompt_logprobs[1:]]),
                list(one.outputs[0].token_ids),
            )
            for one in found
        ]

    def model(self):
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.model

    def preemptions(self):
        return sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")


@torch.no_grad()
def by_transformers(directory, ids):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    x = torch.tensor([ids])
    return model(x).logits.log_softmax(-1)[0, :-1].gather(1, x[0, 1:, None])[:, 0]


def assert_same_start(directory, got, ids):
    want = by_transformers(directory, ids)
    assert (got - want)[:STEPS].abs().max() < 1e-3
    assert (got - want).abs().mean() < 0.5, "codes differ here and there, but not what the model says"


@pytest.mark.parametrize(
    "family,case,recipe",
    [
        ("llama", "plain", {"prefix_tokens": 2}),
        ("llama", "biases", {"weight_bits": 4, "prefix_tokens": 1, "act_codes": "symmetric"}),
        ("llama", "llama3", {"weight_bits": 3}),
        ("llama", "plain", {"kv_bits": 16, "prefix_tokens": 0, "head_bits": 16, "embed_bits": 16}),
        ("llama", "plain", {"rotation.r4": "random", "act_group_size": -1}),
        ("llama", "plain", {"rotation.r3": "random_hadamard"}),
        ("mistral", "window", {"prefix_tokens": 2}),
        ("qwen2", "plain", {"weight_bits": 4}),
        ("qwen3", "plain", {"prefix_tokens": 1}),
        ("phi3", "partial", {"prefix_tokens": 1}),
    ],
)
def test_first_steps_are_those_of_transformers(family, case, recipe, tmp_path):
    shape = {"sliding_window": 4} if case == "window" else {}
    if family == "qwen2":  # vLLM knows no other width of its heads than hidden / heads
        shape = {"head_dim": 16}
    directory = checkpoint(tmp_path / "m", family, case, shape, **{"prefix_tokens": 0, **recipe})
    ids = ids_of(40)
    with Served(directory) as server:
        ((got, _),) = server.answers([ids])
        fused = {name for name, module in server.model().named_modules() if "forward" in vars(module)}
    assert_same_start(directory, got, ids)
    whole = recipe.get("kv_bits") != 16 and family != "qwen3"
    whole = whole and not any("random" in str(recipe.get(f"rotation.{name}")) for name in ("r3", "r4"))
    assert len(fused) == (3 if whole and case != "partial" else 0), "layers that are one op"


@pytest.mark.parametrize("family,r4", [("llama", "hadamard"), ("mistral", "hadamard"), ("llama", "random")])
def test_compiled(family, r4, tmp_path):
    directory = checkpoint(tmp_path / "m", family, **{"prefix_tokens": 1, "rotation.r4": r4})
    ids = ids_of(40)
    with Served(directory, enforce_eager=False) as server:
        ((got, _),) = server.answers([ids])
    assert_same_start(directory, got, ids)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype, tmp_path):
    directory, ids = checkpoint(tmp_path / "m", weight_bits=4, prefix_tokens=1), ids_of(40)
    with Served(directory, dtype=dtype) as server:
        ((got, _),) = server.answers([ids])
    assert (got - by_transformers(directory, ids)).abs().mean() < 0.5


def test_a_layer_as_one_op_computes_what_its_modules_do(tmp_path, monkeypatch):
    directory = checkpoint(tmp_path / "m", "mistral", "window", {"sliding_window": 24}, prefix_tokens=1)
    prompts = [ids_of(40), ids_of(7, seed=1), ids_of(30, seed=2)]
    with Served(directory) as server:
        got = server.answers(prompts)
    monkeypatch.setattr("w2a4.hub.vllm.layer.fuse", lambda layer: None)
    with Served(directory) as server:
        want = server.answers(prompts)
    for (one, _), (other, _) in zip(got, want, strict=True):
        assert (one - other)[:STEPS].abs().max() < 1e-3 and (one - other).abs().mean() < 0.5


@pytest.mark.parametrize("family,case", [("llama", "plain"), ("mistral", "window")])
def test_neither_batches_nor_chunks_nor_preemption_nor_kept_prefixes_change_a_bit(family, case, tmp_path):
    """Rows do not depend on one another, keys are rounded one by one: any schedule gives the same numbers."""
    shape = {"sliding_window": 24} if case == "window" else {}
    directory = checkpoint(tmp_path / "m", family, case, shape, prefix_tokens=1)
    prompts = [ids_of(count, seed=count) for count in (90, 3, 61, 90, 33)]
    prompts[3][:64] = prompts[0][:64]  # a prefix that may be kept
    with Served(directory, enable_prefix_caching=False, max_num_seqs=1) as server:
        want = server.answers(prompts, tokens=24)
    schedules = (
        {"enable_prefix_caching": True},
        {"enable_chunked_prefill": True, "max_num_batched_tokens": 32},
        # As many blocks as all prompts take, and fewer than what they become.
        {"num_gpu_blocks_override": 24, "block_size": 16, "disable_log_stats": False},
    )
    for options in schedules:
        with Served(directory, **options) as server:
            for _ in range(2):
                for (got, tokens), (same, expected) in zip(server.answers(prompts, 24), want, strict=True):
                    assert tokens == expected, options
                    assert torch.equal(got, same), options
            if "num_gpu_blocks_override" in options and family == "llama":  # a window frees blocks
                assert server.preemptions() > 0


#: Widths that two processes can halve: groups of 32, and R4 in two blocks.
HALVED = {"intermediate_size": 128}, {"group_size": 32, "rotation.r4_blocks": 2}


@pytest.mark.parametrize(
    "recipe", [{"prefix_tokens": 1}, {"weight_bits": 4, "kv_bits": 16, "prefix_tokens": 0}]
)
def test_two_processes_give_what_one_gives(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    shape, settings = HALVED
    directory = checkpoint(tmp_path / "m", shape=shape, **settings, **recipe)
    prompts = [ids_of(40), ids_of(7, seed=1)]
    with Served(directory) as server:
        want = server.answers(prompts)
    with Served(directory, tensor_parallel_size=2, distributed_executor_backend="mp") as server:
        got = server.answers(prompts)
    for (one, _), (both, _) in zip(want, got, strict=True):
        assert (one - both)[:STEPS].abs().max() < 1e-3
        assert (one - both).abs().mean() < 0.5


@pytest.mark.parametrize(
    "recipe,message",
    [
        ({"group_size": 32}, "R4 is hadamard in blocks of 128 inputs.*rotation.r4_blocks=2"),
        ({"rotation.r4": "none", "group_size": -1}, "all inputs share one scale of weights"),
        ({"rotation.r4": "none", "group_size": 32, "act_group_size": -1}, "share one scale of activations"),
        ({"rotation.r4": "none", "group_size": 32, "weight_bits": 3}, "3-bit codes is two planes"),
    ],
)
def test_linears_that_cannot_be_cut(recipe, message, tmp_path, monkeypatch):
    """Asked of the method itself: what it raises in a worker, vLLM prints and does not hand on."""
    from w2a4.hub.vllm import linear
    from w2a4.hub.vllm.config import W2A4Quantization

    directory = checkpoint(tmp_path / "m", shape=HALVED[0], prefix_tokens=0, **recipe)
    config = json.loads(open(os.path.join(directory, "config.json")).read())
    quantization = W2A4Quantization.from_config(config["quantization_config"])
    quantization.head_dim = 32
    monkeypatch.setattr(linear, "get_tensor_model_parallel_world_size", lambda: 2)
    method = linear.PackedLinearMethod(quantization, quantization.family.mlp_out)
    with pytest.raises(w2a4.CheckpointError, match=f"tensor_parallel_size=2: down_proj has 128.*{message}"):
        method.create_weights(torch.nn.Module(), 64, [96], 128, 96, torch.float32, weight_loader=None)


@pytest.mark.parametrize(
    "recipe,options,message",
    [
        ({"kv_bits": 16, "prefix_tokens": 1}, {}, "prefix of 1 tokens needs w2a4's attention"),
        ({"sink_tokens": 2, "prefix_tokens": 0}, {}, "sink_tokens=2"),
        ({"act_bits": 16, "prefix_tokens": 0}, {}, "its activations 16"),
        ({"prefix_tokens": 0}, {"enable_lora": True}, "cannot serve LoRA adapters"),
        ({"prefix_tokens": 0}, {"kv_cache_dtype": "fp8"}, "kv_cache_dtype=fp8.*leave --kv-cache-dtype out"),
    ],
)
def test_what_is_refused(recipe, options, message, tmp_path):
    directory = checkpoint(tmp_path / "m", **recipe)
    with pytest.raises(Exception, match=f"(?s){message}"), Served(directory, **options):
        pass


def test_families_that_vllm_has_no_code_for(tmp_path):
    directory = checkpoint(tmp_path / "m", "smollm3", prefix_tokens=0)
    with pytest.raises(Exception, match="no code of its own for smollm3"), Served(directory):
        pass


def test_heads_that_vllm_takes_for_others(tmp_path):
    directory = checkpoint(tmp_path / "m", "qwen2", prefix_tokens=0)
    with pytest.raises(Exception, match="16 wide, and config.json says head_dim=32"), Served(directory):
        pass


def test_a_damaged_shard(tmp_path):
    directory = checkpoint(tmp_path / "m", prefix_tokens=0)
    file = os.path.join(directory, "model.safetensors")
    with open(file, "r+b") as shard:
        shard.seek(-5, os.SEEK_END)
        shard.write(b"\x55")
    with pytest.raises(Exception, match="not what was written|damaged"), Served(directory):
        pass


@pytest.mark.parametrize("kv_bits", [4, 16])
def test_a_packed_model_drafts_for_its_original(kv_bits, tmp_path):
    original = tiny_family("llama", "plain", vocab_size=300, hidden_size=96)
    original.save_pretrained(tmp_path / "original")
    prefix = 1 if kv_bits == 4 else 0
    draft = checkpoint(tmp_path / "draft", weight_bits=4, kv_bits=kv_bits, prefix_tokens=prefix)
    prompts, options = [ids_of(20), ids_of(7, seed=1)], {"disable_log_stats": False}
    with Served(str(tmp_path / "original")) as served:
        alone = served.answers(prompts, tokens=24)
    speculative = {"method": "draft_model", "model": draft, "num_speculative_tokens": 3}
    with Served(str(tmp_path / "original"), speculative_config=speculative, **options) as served:
        helped = served.answers(prompts, tokens=24)
        drafted = [m.value for m in served.llm.get_metrics() if m.name.endswith("_num_draft_tokens")]
    assert [tokens for _, tokens in helped] == [tokens for _, tokens in alone] and drafted[0] > 0


def test_another_vllm(tmp_path, monkeypatch):
    directory = checkpoint(tmp_path / "m", prefix_tokens=0)
    monkeypatch.setattr("w2a4.hub.vllm.config.version_of_vllm", lambda: "0.99.1")
    with pytest.raises(Exception, match=r"vllm 0.99.1: w2a4 serves .* vllm 0.32"), Served(directory):
        pass
