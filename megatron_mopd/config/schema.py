"""Every configuration key, its type, its default and what it means: one dataclass a section, frozen.

Names are Megatron's own. ``TransformerConfig`` fields of megatron-core may be written directly in
``student``, for example ``num_layers`` or ``moe_router_topk``; they are collected in
``ModelConfig.transformer``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


class ConfigError(ValueError):
    """A user's mistake, found before training starts: what is wrong, where, and what to do, in one line."""


@dataclass(frozen=True)
class ModelConfig:
    """A GPT model: where its weights come from and what it looks like (`student`)."""

    load: str | None = None
    """Checkpoint to start from (a directory with `latest_checkpointed_iteration.txt`, or one `iter_*` of it).
    Its architecture is used; `None` initialises a new model from `seed`."""
    vocab_size: int | None = None
    """Number of real token ids; default: the tokenizer's."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of this times `tensor_model_parallel_size`, never sampled."""
    max_position_embeddings: int | None = None
    """Longest sequence the model was made for, as its checkpoint says; nothing here limits it."""
    position_embedding_type: str = "rope"
    """`rope` or `none`."""
    rotary_base: float = 10000.0
    """Base period of the rotary embedding."""
    rotary_percent: float = 1.0
    """Share of each head's channels that is rotated."""
    rope_scaling: dict[str, Any] | None = None
    """Stretches the rotary embedding: `rope_type` (`linear`, `llama3` or `yarn`), `factor` and what else that
    type needs, under the names of Hugging Face's `rope_parameters`."""
    attention_output_bias: bool = False
    """A bias on the attention's output projection alone (`add_bias_linear` puts one on every linear)."""
    qk_layernorm_over_heads: bool = False
    """The norms of `qk_layernorm` run over all heads of a token together (OLMoE) instead of over each."""
    share_embeddings_and_output_weights: bool = False
    """Tie the output head to the input embedding."""
    transformer: dict[str, Any] = field(default_factory=dict)
    """Any other field of megatron-core's `TransformerConfig`, by its own name, directly in the section."""


@dataclass(frozen=True)
class TeacherConfig:
    """One frozen domain expert (an entry of the list `teachers`)."""

    name: str = ""
    """Unique name, used in `routing` and in every metric. `self` is the student as it was at the start."""
    load: str | None = None
    """Checkpoint directory of the expert; must be left out for `self` and given for every other teacher."""
    kl_floor: float = 1e-6
    """Mean KL per token at the first step below which an alarm says that the teacher equals the student."""
    kl_ceiling: float = 5.0
    """Mean KL per token at the first step above which an alarm says that the teacher does not fit."""


@dataclass(frozen=True)
class TeacherStorageConfig:
    """Where the teachers' weights rest, and what is kept of their forward passes (`teacher_storage`)."""

    mode: str = "host"
    """`host`: every rank keeps its own shard of every teacher in (page-locked) host memory; `host_sharded`:
    every data-parallel replica keeps its part, an all-gather puts a teacher together when it arrives; `mmap`:
    files written once into `mmap_directory`, read when a teacher arrives."""
    dtype: str | None = None
    """Resting form: `None` as computed with (`params_dtype`), or `int8` or `fp8` with a scale per 128
    weights."""
    mmap_directory: str | None = None
    """Directory of the `mmap` files; default: `teachers` in the run directory. May be a disk of each host's
    own."""
    hidden_cache_device: str = "host"
    """Where last-layer hidden states wait for the loss: `host` memory, or the `device`."""
    hidden_cache_dtype: str | None = None
    """Precision they are kept in; `None`: that of the model (`params_dtype`), which loses nothing."""
    hidden_cache_bytes: int | None = None
    """Most bytes of hidden states that a rank of the last stage keeps at once; `None`: no limit. A batch that
    needs more is processed in parts, with the same result."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are laid out over ranks; student and teachers share the layout."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (PP)."""
    virtual_pipeline_model_parallel_size: int | None = None
    """Model chunks per stage of the student (VPP); `None` or 1 means no interleaving."""
    expert_model_parallel_size: int = 1
    """Ranks that share the experts of each MoE layer (EP), taken out of the data-parallel ranks."""
    expert_tensor_parallel_size: int | None = None
    """Tensor parallelism inside each expert; default: `tensor_model_parallel_size`."""
    context_parallel_size: int = 1
    """Ranks that share each sequence (CP)."""
    sequence_parallel: bool = False
    """Split activations between tensor-parallel regions along the sequence; required by MoE with TP > 1."""
    distributed_timeout_minutes: float = 10.0
    """How long a rank waits at start-up and in a collective before the job is ended with an error."""


@dataclass(frozen=True)
class PromptSource:
    """A source of prompts (entry of `data.prompts` or `data.eval`): a JSONL file or a reasoning-gym task."""

    path: str | None = None
    """JSONL file of objects: `prompt` (text or chat messages), `domain`, optional `answer` and `verifier`."""
    task: str | None = None
    """Name of a reasoning-gym task, for example `gcd`."""
    params: dict[str, Any] = field(default_factory=dict)
    """Parameters of the reasoning-gym task."""
    size: int = 1000
    """How many prompts of the reasoning-gym task to make."""
    seed: int = 0
    """Seed of the reasoning-gym task: other seeds give other prompts."""
    domain: str | None = None
    """Domain of these prompts; default: the task's name, or each JSONL line's own `domain`."""
    weight: float = 1.0
    """Share of this source in a batch, relative to the other sources."""
    verifier: str | None = None
    """Scores the answers: `reasoning_gym`, `math_verify` or `exact_match`; default: by the source's kind."""


@dataclass(frozen=True)
class DataConfig:
    """Prompts, tokenizer and sequence length."""

    tokenizer: str = ""
    """A SentencePiece `.model` file or a Hugging Face tokenizer directory."""
    seq_length: int = 512
    """Longest prompt plus response in tokens; a longer prompt is an error."""
    prompts: list[PromptSource] = field(default_factory=list)
    """Where training prompts come from."""
    eval: list[PromptSource] = field(default_factory=list)
    """Held-out prompts, scored every `schedule.eval_interval` iterations and at the end."""


@dataclass(frozen=True)
class RolloutConfig:
    """How the student samples its trajectories."""

    samples_per_prompt: int = 1
    """Responses sampled for each prompt."""
    max_new_tokens: int = 64
    """Longest response in tokens, the end-of-sequence token included."""
    temperature: float = 1.0
    """Softmax temperature; 1 samples the student's own distribution, 0 is greedy."""
    top_p: float = 1.0
    """Nucleus sampling threshold; 1 keeps the whole vocabulary."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end a response, besides the tokenizer's end-of-sequence token."""
    routing_replay: bool = False
    """Train with the experts that each token went to while it was sampled (a mixture-of-experts student)."""
    repetition_stop: int = 0
    """End a response, unfinished, when its last tokens are one pattern this many times in a row; 0: never."""
    repetition_max_period: int = 16
    """Longest pattern, in tokens, that `repetition_stop` looks for."""
    batches_ahead: int = 0
    """Rollout batches sampled before the one that is being trained on is used up: their samples come from
    weights that many batches older, and teachers can score them in the pipeline's bubbles."""
    write_ahead: bool = True
    """Write sampled tokens into `rollouts/` of the run directory every few seconds: a run that is interrupted
    does not sample them again, and goes on with unfinished responses (not with `routing_replay`). The next
    checkpoint removes them; of more than 512 batches or 4 GiB since the last one, the oldest are removed."""
    max_batch_size: int = 256
    """Most sequences decoded at once on one data-parallel rank (bounds the KV cache)."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is minimised. Every key but `reduction` and `chunk_size` may be overridden for one domain."""

    kind: str = "full_vocab_kl"
    """On the student's own trajectories, against the routed teachers: `full_vocab_kl` (reverse KL),
    `top_k_kl` (reverse KL over the k likeliest tokens and one tail outcome), `forward_kl`, `jsd`,
    `sampled_token` (log-ratio of the sampled token as an advantage). `grpo`: group-relative advantage of the
    verifier's reward, no teacher. `sft`: cross-entropy on `answer`."""
    weight: float = 1.0
    """Factor of this objective's loss, `add` included."""
    add: dict[str, float] = field(default_factory=dict)
    """More kinds, with their weights, whose losses are added to that of `kind`."""
    apply_as: str | None = None
    """`loss` or `advantage`: said explicitly, it is checked against the only correct use of the kind."""
    reduction: str = "token_mean"
    """`token_mean`, `sequence_mean` (every response counts once) or `domain_mean` (every domain does)."""
    temperature: float = 1.0
    """Temperature of student and teacher alike inside the divergence or the log-ratio."""
    chunk_size: int = 1024
    """Tokens whose logits exist at the same time in the loss."""
    beta: float | None = None
    """`jsd`: weight of the teacher in the mixture; default 0.5."""
    top_k: int | None = None
    """`top_k_kl`: how many tokens are compared one by one."""
    top_k_from: str | None = None
    """`top_k_kl`: whose likeliest tokens, `teacher` (default) or `student`."""
    policy_loss: str = "plain"
    """`sampled_token` and `grpo`: `plain` (-A log theta) or `ppo_clip` (the clipped ratio to the policy at
    the start of the rollout batch)."""
    clip_eps_low: float | None = None
    """`ppo_clip`: the ratio is clipped below 1 - this; default 0.2."""
    clip_eps_high: float | None = None
    """`ppo_clip`: the ratio is clipped above 1 + this; default 0.2."""
    proximal: str = "recompute"
    """`ppo_clip`: `recompute` (one forward pass of the training model before a rollout batch's first step) or
    `behaviour` (the sampler's own log-probs, which saves that pass)."""
    outcome_reward_weight: float = 0.0
    """`sampled_token`: alpha of MiMo-V2-Flash, weight of the group-relative outcome advantage that is added
    to the distillation advantage."""
    normalize_advantage: bool = True
    """Outcome advantages are divided by their group's standard deviation, as in GRPO."""
    future_discount: float = 0.0
    """`sampled_token`: a token's advantage is the sum of the log-ratios from it to the end of the response,
    discounted by this factor per token; 0 counts only its own."""
    log_ratio_clamp: float | None = None
    """`sampled_token`: log-ratios are clamped to [-this, this]."""
    shaping: float | None = None
    """`sampled_token`: a in log(a T + (1 - a) theta) - log theta, which is bounded below by log(1 - a)."""
    rollout_correction: str = "none"
    """Per-token weight for theta / mu, the ratio of the model in training to the sampler: `tis` (clamped to
    the band), `icepop` (0 outside), `sequence_mask` (a response is dropped when its mean ratio leaves the
    band), `none`."""
    importance_low: float | None = None
    """Lower end of the band of ratios; default 0.5."""
    importance_high: float | None = None
    """Upper end of the band of ratios; default 2."""
    drift_gate_block: int = 0
    """Weigh blocks of this many response tokens by how far the student has moved on them since they were
    sampled; 0 switches the gate off."""
    drift_gate_sharpness: float | None = None
    """How steeply that weight falls with the block's mean |log theta - log mu|; default 1."""
    per_domain: dict[str, Any] = field(default_factory=dict)
    """Domain -> the keys that differ for it."""


@dataclass(frozen=True)
class RewardsConfig:
    """How rewards are computed: the verifiers of the data, in processes of their own."""

    workers: int = 1
    """Verifier processes per data-parallel rank."""
    timeout_seconds: float = 5.0
    """How long one response may take to be judged; afterwards its reward is missing."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule, with Megatron's names."""

    lr: float = 1e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: str = "constant"
    """`constant`, `linear`, `cosine`, `inverse-square-root` or `WSD`."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up from `lr_warmup_init`."""
    lr_warmup_init: float = 0.0
    """Learning rate before the first step of the warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    adam_beta1: float = 0.9
    """First-moment decay."""
    adam_beta2: float = 0.95
    """Second-moment decay."""
    adam_eps: float = 1e-8
    """Added to the denominator."""
    clip_grad: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs."""
    freeze_router: bool = False
    """Leave the routers of a mixture-of-experts student as they are, auxiliary losses included."""
    freeze_expert_bias: bool = False
    """Leave the routers' load-balancing bias as it is."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How long, how much at once, and in which order."""

    train_iters: int = 100
    """Optimizer steps of the whole run; a multiple of `steps_per_rollout`."""
    global_batch_size: int = 64
    """Trajectories per optimizer step, over all data-parallel ranks."""
    steps_per_rollout: int = 1
    """Optimizer steps fed by one rollout batch of `steps_per_rollout` x `global_batch_size` trajectories. The
    later ones train on samples of slightly older weights, and teachers can score them ahead of time."""
    kind: str = "bubble_fill"
    """How teachers share the pipeline with the student; losses and gradients are the same. `bubble_fill`:
    teacher forwards of this and the next optimizer step go where the pipeline would idle; `back_to_back`:
    each step's teachers, then its student, without a pause; `serial`: all teachers of a rollout batch first;
    `megatron`: as `back_to_back`, on megatron-core's own schedules."""
    max_activations: int | None = None
    """Student forward passes (of model chunks) a stage may hold whose backward pass is still to come; `None`:
    as many as the first stage does in megatron-core's schedule. Teachers much slower than the student are
    hidden completely when it is half as much again."""
    max_cached_states: int | None = None
    """Scored micro-batches of teachers that may wait on a stage, look-ahead included; `None`: no limit."""
    micro_batch_size: int = 8
    """Trajectories per forward pass; ignored when `max_tokens_per_micro_batch` is set."""
    max_tokens_per_micro_batch: int | None = None
    """Pack trajectories of any length into micro-batches of at most this many tokens; `None` pads instead."""
    eval_interval: int = 0
    """Iterations between evaluations on `data.eval`; 0 evaluates only at the end."""


@dataclass(frozen=True)
class EvaluationConfig:
    """How held-out prompts (`data.eval`) are answered, besides the greedy answer that accuracy counts."""

    pass_at: list[int] = field(default_factory=list)
    """For every k listed, pass@k: the chance that at least one of k sampled responses is right."""
    samples_per_prompt: int = 0
    """Responses sampled for each held-out prompt; more make pass@k steadier. 0: as many as the largest k."""
    temperature: float = 1.0
    """Softmax temperature of these samples."""
    top_p: float = 1.0
    """Nucleus sampling threshold of these samples."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Saving and resuming the run."""

    save_interval: int = 0
    """Iterations between checkpoints; 0 saves only at the end."""
    save_optimizer: bool = True
    """Keep optimizer state in the checkpoints, so that the run can resume."""
    resume: bool = True
    """Continue from the newest undamaged checkpoint of `run_dir` when there is one."""
    allow_teacher_change: bool = False
    """Continue although teachers are others than those the checkpoint was written with
    (`--allow-teacher-change`)."""
    keep_last: int = 0
    """So many of the newest checkpoints stay, older ones are removed; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints whose iteration is a multiple of this stay all the same; 0: none."""
    best_metric: str = "accuracy"
    """Of the checkpoints that were evaluated, the one with the highest value of this metric is never removed,
    and `checkpoints/best.json` names it."""
    save_best: bool = False
    """Also save right after an evaluation that is better than all before it."""


@dataclass(frozen=True)
class GuardConfig:
    """What ends a run that cannot go on, and what does not."""

    max_skipped_steps: int = 3
    """Optimizer steps in a row that may be left out because the loss or a gradient is not finite; one more
    ends the run."""
    hang_timeout_minutes: float = 60.0
    """A rank that has not begun a new phase (sampling, an optimizer step, evaluation, saving) for so long
    ends the job, and every rank says where it stands. Longer than the longest phase; 0: never."""


@dataclass(frozen=True)
class LogConfig:
    """What is shown and written while the run goes."""

    log_interval: int = 1
    """Iterations between lines on the terminal. `metrics.jsonl` has every iteration, those of long ago in
    compressed files beside it."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run directory: every step up to 2048, then of every metric about
    1024 values whenever the number of steps has doubled."""
    wandb_project: str | None = None
    """Project on Weights & Biases that gets the metrics too (`pip install wandb`); `None`: none is sent."""
    wandb_name: str | None = None
    """What the run is called there; default: the name of `run_dir`."""
    report: bool = True
    """Draw `report.png` at the end."""
    sample_interval: int = 50
    """Iterations between samples for the report, `samples.jsonl`: responses with the divergence of every
    token. The first and the last iteration are always among them; of very many, the first and the newest
    stay. 0: none."""
    samples_per_domain: int = 1
    """Responses of each domain that such a sample holds."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    recipe: str | None = None
    """Known system whose published hyperparameters fill in what is not set here: `mimo_v2_flash`, `glm5`,
    `nemotron_cascade2` or `deepseek_v4`."""
    run_dir: str = ""
    """Everything the run writes goes here, closed to users outside the owner's group."""
    seed: int = 1234
    """Initialisation, data order and sampling derive from it."""
    device: str = "auto"
    """`auto` (CUDA when there is one), `cuda` or `cpu`."""
    params_dtype: str = "float32"
    """`float32`, `bfloat16` or `float64`: weights and activations; loss statistics are at least float32."""
    student: ModelConfig = field(default_factory=ModelConfig)
    teachers: list[TeacherConfig] = field(default_factory=list)
    routing: dict[str, Any] = field(default_factory=dict)
    """Domain -> teacher, or domain -> {teacher: weight}; `default` serves the domains not listed."""
    teacher_storage: TeacherStorageConfig = field(default_factory=TeacherStorageConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    log: LogConfig = field(default_factory=LogConfig)
