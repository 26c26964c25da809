"""Every configuration key with its type, default and meaning: one frozen dataclass per section.

Names are Megatron's own. ``TransformerConfig`` fields of megatron-core may be written directly in
``student``, for example ``num_layers`` or ``moe_router_topk``; they are collected in
``ModelConfig.transformer``.

Annotations define the allowed values of a key: pydantic checks them when a configuration is read
(`loading.py`). The last sentence of a docstring says what happens if a run is resumed with a different value
of the key. The documentation and resuming runs parse it (`resume.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_mopd.choices import ScheduleKind
from megatron_mopd.config.model_schema import (
    ModelConfig,
    ParallelConfig,
    TeacherConfig,
    TeacherStorageConfig,
)
from megatron_mopd.config.objective_schema import ObjectiveConfig
from megatron_mopd.config.value_types import (
    Count,
    CountOrZero,
    Day,
    FiniteNonNegative,
    FinitePositive,
    MinutesOrZero,
    Name,
    NonNegative,
    Positive,
    PositiveShare,
    Real,
    Repetitions,
    Seconds,
    Section,
    ShareBelowOne,
    Text,
)


@dataclass(frozen=True)
class PromptSource(Section):
    """A source of prompts (entry of `data.prompts` or `data.eval`): a JSONL file or a reasoning-gym task."""

    path: Text | None = None
    """JSONL file of objects: `prompt` (text or chat messages), `domain`, optional `answer` and `verifier`. On
    resume: must not change, judged by content."""
    task: Text | None = None
    """Name of a reasoning-gym task, for example `gcd`. On resume: must not change."""
    params: dict[Name, Any] = field(default_factory=dict)
    """Parameters of the reasoning-gym task. On resume: must not change."""
    size: Count = 1000
    """Number of prompts to generate from the reasoning-gym task. On resume: must not change."""
    seed: int = 0
    """Seed of the reasoning-gym task, which determines its prompts. On resume: must not change."""
    domain: Text | None = None
    """Domain of these prompts; default: the task's name, or each JSONL line's own `domain`. On resume: must
    not change."""
    weight: Real = 1.0
    """Share of this source in a batch, relative to the other sources. On resume: must not change."""
    verifier: Text | None = None
    """Scores the answers: `reasoning_gym`, `math_verify` or `exact_match`; default: depends on the kind of
    source. On resume: must not change."""


@dataclass(frozen=True)
class DataConfig(Section):
    """Prompts, tokenizer and sequence length."""

    tokenizer: Text = ""
    """A SentencePiece `.model` file or a Hugging Face tokenizer directory. On resume: must not change, judged
    by content."""
    allow_tokenizer_change: bool = False
    """Start or resume even if a model was trained with a tokenizer or chat template that is not equivalent to
    `tokenizer`; the run reports the difference (`--allow-tokenizer-change`). On resume: may change."""
    date: Day | None = None
    """The date that chat templates use as today's, YYYY-MM-DD; default: the date of the run's first start,
    which `config.yaml` in the run directory records so that a resumed run renders the same prompts. If a
    template prints the date, changing it changes the prompts, which a resume refuses. On resume: may
    change."""
    seq_length: Count = 512
    """Maximum tokens of prompt plus response; a longer prompt is an error. On resume: may change."""
    prompts: list[PromptSource] = field(default_factory=list)
    """Sources of the training prompts. On resume: must not change."""
    eval: list[PromptSource] = field(default_factory=list)
    """Held-out prompts, scored every `schedule.eval_interval` iterations and at the end. On resume: may
    change."""


@dataclass(frozen=True)
class RolloutConfig(Section):
    """How the student samples its trajectories."""

    samples_per_prompt: Count = 1
    """Responses sampled for each prompt. On resume: changes the data position."""
    max_new_tokens: Count = 64
    """Maximum response length in tokens, including the end-of-sequence token. On resume: may change."""
    temperature: NonNegative = 1.0
    """Softmax temperature; 1 samples the student's own distribution, 0 is greedy. On resume: may change."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling threshold; 1 keeps the whole vocabulary. On resume: may change."""
    top_k: CountOrZero = 0
    """Keep only the k most likely tokens; 0 keeps all. On resume: may change."""
    stop_token_ids: list[int] = field(default_factory=list)
    """Tokens that end a response, besides the end-of-sequence tokens of the tokenizer and of the student's
    `generation_config.json` and `config.json`. On resume: may change."""
    routing_replay: bool = False
    """Train with the experts that each token was routed to during sampling (mixture-of-experts students). On
    resume: may change."""
    repetition_stop: Repetitions = 0
    """End a response, as unfinished, when its last tokens repeat one pattern this many times; 0: never. On
    resume: may change."""
    repetition_max_period: Count = 16
    """Longest pattern, in tokens, that `repetition_stop` looks for. On resume: may change."""
    batches_ahead: CountOrZero = 0
    """Number of rollout batches sampled ahead of the one being trained on: their samples come from weights
    that many batches older, and teachers can score them in the pipeline's bubbles. On resume: may change."""
    write_ahead: bool = True
    """Write sampled tokens into `rollouts/` of the run directory every few seconds, so that an interrupted
    run does not sample them again and continues unfinished responses (not with `routing_replay`). The next
    checkpoint removes them; beyond 512 batches or 4 GiB since the last one, the oldest are removed. On
    resume: may change."""
    max_batch_size: Count = 256
    """Maximum number of sequences decoded at once on one data-parallel rank (bounds the KV cache). On resume:
    may change."""


@dataclass(frozen=True)
class RewardsConfig(Section):
    """How rewards are computed: the data's verifiers, in separate processes."""

    workers: Count = 1
    """Verifier processes per data-parallel rank. On resume: may change."""
    timeout_seconds: Seconds = 5.0
    """Time limit for judging one response; after that, its reward is missing. On resume: may change."""


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule, with Megatron's names."""

    lr: FiniteNonNegative = 1e-5
    """Peak learning rate. On resume: may change."""
    min_lr: FiniteNonNegative = 0.0
    """Learning rate at the end of the decay. On resume: may change."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root", "WSD"] = "constant"
    """`constant`, `linear`, `cosine`, `inverse-square-root` or `WSD`. On resume: may change."""
    lr_warmup_iters: CountOrZero = 0
    """Iterations of linear warm-up from `lr_warmup_init`. On resume: may change."""
    lr_warmup_init: FiniteNonNegative = 0.0
    """Learning rate before the first step of the warm-up. On resume: may change."""
    weight_decay: FiniteNonNegative = 0.0
    """Decoupled weight decay. On resume: may change."""
    adam_beta1: ShareBelowOne = 0.9
    """First-moment decay. On resume: may change."""
    adam_beta2: ShareBelowOne = 0.95
    """Second-moment decay. On resume: may change."""
    adam_eps: FinitePositive = 1e-8
    """Added to the denominator. On resume: may change."""
    clip_grad: NonNegative = 1.0
    """Global gradient norm above which gradients are scaled down; 0 switches clipping off. On resume: may
    change."""
    use_distributed_optimizer: bool = True
    """Shard optimizer state over data-parallel ranks (ZeRO-1). On resume: must not change."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass runs. On resume: may change."""
    freeze_router: bool = False
    """Freeze the routers of a mixture-of-experts student and drop their auxiliary losses. On resume: must not
    change."""
    freeze_expert_bias: bool = False
    """Freeze the routers' load-balancing bias. On resume: may change."""


@dataclass(frozen=True)
class ScheduleConfig(Section):
    """Length of the run, batch sizes, and pipeline schedule."""

    train_iters: CountOrZero = 100
    """Optimizer steps of the whole run; a multiple of `steps_per_rollout`. On resume: may change."""
    global_batch_size: Count = 64
    """Trajectories per optimizer step, over all data-parallel ranks. On resume: changes the data position."""
    steps_per_rollout: Count = 1
    """Optimizer steps per rollout batch of `steps_per_rollout` x `global_batch_size` trajectories. The later
    steps train on samples from slightly older weights, and teachers can score them ahead of time. On resume:
    changes the data position."""
    kind: ScheduleKind = "bubble_fill"
    """How teachers share the pipeline with the student; losses and gradients are the same. `bubble_fill`:
    teacher forward passes of this and the next optimizer step fill the pipeline's bubbles; `back_to_back`:
    each step's teachers, then its student, without a gap; `serial`: all teachers of a rollout batch first. On
    resume: may change."""
    max_activations: CountOrZero | None = None
    """Maximum number of student forward passes (of model chunks) on a stage whose backward pass is pending;
    `None`: as many as the first stage has in megatron-core's schedule. With 1.5 times that number, even
    teachers much slower than the student are hidden completely. On resume: may change."""
    max_cached_states: CountOrZero | None = None
    """Maximum number of scored teacher micro-batches waiting on a stage, including look-ahead; `None`: no
    limit. On resume: may change."""
    micro_batch_size: Count = 8
    """Trajectories per forward pass; ignored when `max_tokens_per_micro_batch` is set. On resume: may
    change."""
    max_tokens_per_micro_batch: Count | None = None
    """Pack trajectories of any length into micro-batches of at most this many tokens; `None` pads instead. On
    resume: may change."""
    eval_interval: CountOrZero = 0
    """Iterations between evaluations on `data.eval`; 0 evaluates only at the end. On resume: may change."""


@dataclass(frozen=True)
class EvaluationConfig(Section):
    """How held-out prompts (`data.eval`) are answered, besides the greedy answer used for accuracy."""

    pass_at: list[Count] = field(default_factory=list)
    """Report pass@k for every k listed: the probability that at least one of k sampled responses is correct.
    On resume: may change."""
    samples_per_prompt: CountOrZero = 0
    """Responses sampled for each held-out prompt; more reduce the variance of pass@k. 0: as many as the
    largest k. On resume: may change."""
    temperature: Positive = 1.0
    """Softmax temperature of these samples. On resume: may change."""
    top_p: PositiveShare = 1.0
    """Nucleus sampling threshold of these samples. On resume: may change."""


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Saving and resuming the run."""

    save_interval: CountOrZero = 0
    """Iterations between checkpoints; 0 saves only at the end. On resume: may change."""
    save_optimizer: bool = True
    """Keep optimizer state in the checkpoints, so that the run can resume. On resume: may change."""
    resume: bool = True
    """Resume from the newest undamaged checkpoint in `run_dir`, if there is one. On resume: may change."""
    allow_teacher_change: bool = False
    """Resume even if the teachers differ from those the checkpoint was written with
    (`--allow-teacher-change`). On resume: may change."""
    keep_last: CountOrZero = 0
    """Number of newest checkpoints to keep, older ones are removed; 0 keeps all. On resume: may change."""
    keep_every: CountOrZero = 0
    """Checkpoints whose iteration is a multiple of this are always kept; 0: none. On resume: may change."""
    best_metric: Text = "accuracy"
    """The evaluated checkpoint with the highest value of this metric is never removed, and
    `checkpoints/best.json` names it. On resume: may change."""
    save_best: bool = False
    """Also save right after an evaluation that is better than all earlier ones. On resume: may change."""


@dataclass(frozen=True)
class GuardConfig(Section):
    """Failures that end a run, and those that it tolerates."""

    max_skipped_steps: CountOrZero = 3
    """Consecutive optimizer steps that may be skipped because the loss or a gradient is not finite; one more
    ends the run. On resume: may change."""
    hang_timeout_minutes: MinutesOrZero = 60.0
    """A rank that has not started a new phase (sampling, an optimizer step, evaluation, saving) for this long
    ends the job, and every rank reports its stack. Must exceed the longest phase; 0: never. On resume: may
    change."""


@dataclass(frozen=True)
class LogConfig(Section):
    """What a run prints and records."""

    log_interval: Count = 1
    """Iterations between lines on the terminal. `metrics.jsonl` has every iteration; old ones are moved to
    compressed files next to it. On resume: may change."""
    tensorboard: bool = True
    """Write TensorBoard event files into the run directory: every step up to 2048, then about 1024 values per
    metric each time the number of steps doubles. On resume: may change."""
    wandb_project: Text | None = None
    """Weights & Biases project that also receives the metrics (`pip install wandb`); `None`: nothing is sent.
    On resume: may change."""
    wandb_name: Text | None = None
    """Name of the run on Weights & Biases; default: the name of `run_dir`. On resume: may change."""
    report: bool = True
    """Draw `report.png` at the end. On resume: may change."""
    sample_interval: CountOrZero = 50
    """Iterations between samples for the report, `samples.jsonl`: responses with the divergence on every
    token. The first and the last iteration are always sampled; if there are very many samples, only the first
    and the newest are kept. 0: none. On resume: may change."""
    samples_per_domain: CountOrZero = 1
    """Responses per domain in each sample. On resume: may change."""


@dataclass(frozen=True)
class Config(Section):
    """A whole run."""

    recipe: Text | None = None
    """Published system whose hyperparameters are the defaults of keys not set here: `mimo_v2_flash`, `glm5`,
    `nemotron_cascade2` or `deepseek_v4`. On resume: may change."""
    run_dir: Text = ""
    """Directory for everything the run writes, closed to users outside the owner's group. On resume: may
    change."""
    seed: int = 1234
    """Seed of initialization, data order and sampling. On resume: must not change."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` (CUDA if available), `cuda` or `cpu`. On resume: may change."""
    params_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Type of weights and activations, `float32`, `bfloat16` or `float64`; loss statistics are at least
    float32. On resume: must not change."""
    student: ModelConfig = field(default_factory=ModelConfig)
    teachers: list[TeacherConfig] = field(default_factory=list)
    routing: dict[Name, Any] = field(default_factory=dict)
    """Domain -> teacher, or domain -> {teacher: weight}; `default` is for domains not listed. On resume: must
    not change."""
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
