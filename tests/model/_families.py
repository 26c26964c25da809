"""Small random Hugging Face models of every family, and their logits as `transformers` computes them."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 83  # prime, so no layout divides it evenly
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)

_BASE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    # Larger weights than usual make attention and routing matter in a model this small.
    initializer_range=0.3,
    pad_token_id=None,
    bos_token_id=None,
    eos_token_id=None,
)
_QWEN3_MOE = _BASE | dict(head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
_OLMOE = _BASE | dict(num_experts=4, num_experts_per_tok=2, intermediate_size=24)
_DEEPSEEK = _BASE | dict(
    num_key_value_heads=4,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=4,
    n_shared_experts=2,
    moe_intermediate_size=12,
    first_k_dense_replace=1,
    routed_scaling_factor=2.5,
    q_lora_rank=16,
    kv_lora_rank=12,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rope_parameters=dict(rope_theta=10000.0, mscale=1.0, mscale_all_dim=0.8, **YARN),
    num_nextn_predict_layers=0,
)
_GLM = _BASE | dict(
    head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    moe_intermediate_size=24,
    first_k_dense_replace=2,
    attention_bias=True,
    use_qk_norm=True,
    routed_scaling_factor=1.5,
    rope_parameters=dict(rope_theta=5000.0, rope_type="default", partial_rotary_factor=0.5),
    num_nextn_predict_layers=0,
)

# name -> (model_type, configuration); the cases cover the variants that occur within a family.
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", _BASE | dict(tie_word_embeddings=True)),
    "llama-mha-biases-llama3": (
        "llama",
        _BASE
        | dict(
            num_key_value_heads=4,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_theta=500000.0, **LLAMA3),
        ),
    ),
    "llama-mqa-head-dim-linear": (
        "llama",
        _BASE
        | dict(
            num_key_value_heads=1,
            head_dim=12,
            attention_bias=True,
            rope_parameters=dict(rope_theta=10000.0, rope_type="linear", factor=2.0),
        ),
    ),
    "qwen2": ("qwen2", _BASE | dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", _BASE | dict(head_dim=16)),
    "qwen3-tied-biases-yarn": (
        "qwen3",
        _BASE
        | dict(
            head_dim=16,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_parameters=dict(rope_theta=1000000.0, **YARN),
        ),
    ),
    "qwen3-moe": ("qwen3_moe", _QWEN3_MOE | dict(norm_topk_prob=True)),
    "qwen3-moe-dense-layers-plain-topk": (
        "qwen3_moe",
        _QWEN3_MOE | dict(norm_topk_prob=False, mlp_only_layers=[0, 2], attention_bias=True),
    ),
    "qwen2-moe": (
        "qwen2_moe",
        _BASE
        | dict(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
            decoder_sparse_step=2,
        ),
    ),
    "mixtral": ("mixtral", _BASE | dict(num_local_experts=4, num_experts_per_tok=2)),
    "olmoe": ("olmoe", _OLMOE),
    "olmoe-normalised-topk": (
        "olmoe",
        _OLMOE | dict(num_key_value_heads=4, norm_topk_prob=True, attention_bias=True),
    ),
    "deepseek-v3": ("deepseek_v3", _DEEPSEEK),
    "deepseek-v3-plain": (
        "deepseek_v3",
        _DEEPSEEK
        | dict(
            q_lora_rank=None,
            n_group=1,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=0,
            rms_norm_eps=1e-5,
            rope_parameters=dict(rope_theta=10000.0, rope_type="default"),
        ),
    ),
    "glm4-moe": ("glm4_moe", _GLM),
    "glm4-moe-plain": (
        "glm4_moe",
        _GLM | dict(attention_bias=False, use_qk_norm=False, first_k_dense_replace=0, n_shared_experts=2),
    ),
}


def make(name: str, directory, dtype=torch.float32, seed: int = 0, **save) -> None:
    """Write a case's random model with `save_pretrained`; biases and norms are random too."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model_type, values = CASES[name]
    config = AutoConfig.for_model(model_type, **values)
    torch.manual_seed(hash_of(name) + seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and "inv_freq" not in key:
                tensor.add_(torch.randn_like(tensor) * 0.1)
    model.to(dtype).save_pretrained(directory, **save)


def hash_of(name: str) -> int:
    return sum(ord(letter) * 31**i for i, letter in enumerate(name)) % 2**31


def reference_logits(directory, rows: list[list[int]], dtype: torch.dtype) -> list[torch.Tensor]:
    """Logits [length, vocabulary] of each row, computed separately, without padding or packing."""
    model = _model(directory, dtype)
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0] for row in rows]


def _model(directory, dtype: torch.dtype):
    """Load the model; in float64 the plain formula replaces the norms, which are otherwise float32."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="sdpa", experts_implementation="eager"
    ).eval()
    if dtype == torch.float64:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.forward = _norm_in_float64.__get__(module)
    return model


def _norm_in_float64(self, x):
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def reference_greedy(directory, rows: list[list[int]], new_tokens: int) -> list[tuple]:
    """Greedy continuation of each row with log-probs, by full float64 forward passes without a cache."""
    model = _model(directory, torch.float64)
    result = []
    for row in rows:
        ids, logprobs = list(row), []
        for _ in range(new_tokens):
            with torch.no_grad():
                last = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(int(last.argmax()))
            logprobs.append(last.max().item())
        result.append((tuple(ids[len(row) :]), tuple(logprobs)))
    return result
