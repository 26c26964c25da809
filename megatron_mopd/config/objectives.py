"""The objective of each domain, and which combinations of its keys are valid.

An invalid combination is refused in one sentence that names the key and the allowed alternatives.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import get_args

from megatron_mopd.choices import ObjectiveKind, PolicyKind, TokenKind, VocabularyKind
from megatron_mopd.config.errors import ConfigError, nearest
from megatron_mopd.config.schema import Config, ObjectiveConfig

VOCABULARY_KINDS = get_args(VocabularyKind)
TOKEN_KINDS = get_args(TokenKind)
POLICY_KINDS = get_args(PolicyKind)
KINDS = get_args(ObjectiveKind)

GLOBAL_KEYS = ("reduction", "chunk_size", "per_domain")
"""Keys that apply to the whole run, because one batch has one normalization."""

_DEFAULTS = {f.name: f.default for f in dataclasses.fields(ObjectiveConfig)}


def kinds_of(objective: ObjectiveConfig) -> dict[str, float]:
    """Every kind in the sum with its weight, without the factor `weight`."""
    return {objective.kind: 1.0} | objective.add


def _has(*kinds: str) -> Callable[[ObjectiveConfig], bool]:
    return lambda objective: any(kind in kinds for kind in kinds_of(objective))


def _is_on_policy(objective: ObjectiveConfig) -> bool:
    return objective.kind != "sft"


# Key -> (whether it applies to an objective, what it needs). Setting it for another objective is an error.
_APPLIES: dict[str, tuple[Callable[[ObjectiveConfig], bool], str]] = {
    "beta": (_has("jsd"), "kind jsd"),
    "top_k": (_has("top_k_kl"), "kind top_k_kl"),
    "top_k_from": (_has("top_k_kl"), "kind top_k_kl"),
    "policy_loss": (_has(*POLICY_KINDS), "kind sampled_token or grpo"),
    "clip_eps_low": (lambda o: o.policy_loss == "ppo_clip", "policy_loss=ppo_clip"),
    "clip_eps_high": (lambda o: o.policy_loss == "ppo_clip", "policy_loss=ppo_clip"),
    "proximal": (lambda o: o.policy_loss == "ppo_clip", "policy_loss=ppo_clip"),
    "outcome_reward_weight": (
        _has("sampled_token"),
        "kind sampled_token; with other kinds write add.grpo=WEIGHT",
    ),
    "normalize_advantage": (
        lambda o: _has("grpo")(o) or o.outcome_reward_weight > 0,
        "kind grpo or outcome_reward_weight > 0",
    ),
    "future_discount": (_has("sampled_token"), "kind sampled_token"),
    "log_ratio_clamp": (_has("sampled_token"), "kind sampled_token"),
    "shaping": (_has("sampled_token"), "kind sampled_token"),
    "temperature": (_is_on_policy, "an objective on sampled responses, not sft"),
    "rollout_correction": (_is_on_policy, "an objective on sampled responses, not sft"),
    "importance_low": (
        lambda o: o.rollout_correction != "none",
        "rollout_correction tis, icepop or sequence_mask",
    ),
    "importance_high": (
        lambda o: o.rollout_correction != "none",
        "rollout_correction tis, icepop or sequence_mask",
    ),
    "drift_gate_block": (_is_on_policy, "an objective on sampled responses, not sft"),
    "drift_gate_sharpness": (lambda o: o.drift_gate_block > 0, "drift_gate_block > 0"),
}


def needs_teachers(objective: ObjectiveConfig) -> bool:
    """Whether any term of the sum compares the student with a teacher."""
    return any(kind in (*VOCABULARY_KINDS, *TOKEN_KINDS) for kind in kinds_of(objective))


def compares_tokens_only(objective: ObjectiveConfig) -> bool:
    """Whether it needs only log T of the sampled tokens from its teachers, one number each."""
    return _has(*TOKEN_KINDS)(objective) and not _has(*VOCABULARY_KINDS)(objective)


def needs_rewards(objective: ObjectiveConfig) -> bool:
    """Whether any term of the sum needs the verifier's score."""
    return "grpo" in kinds_of(objective) or objective.outcome_reward_weight > 0


def needs_policy(objective: ObjectiveConfig) -> bool:
    """Whether log theta of the sampled tokens is needed for an advantage, a correction or a gate."""
    corrected = objective.rollout_correction != "none" or objective.drift_gate_block > 0
    return corrected or any(kind in POLICY_KINDS for kind in kinds_of(objective))


def needs_old_policy(objective: ObjectiveConfig) -> bool:
    """Whether log-probs under the policy at the start of the rollout batch must be computed."""
    return objective.policy_loss == "ppo_clip" and objective.proximal == "recompute"


def samples_per_prompt(config: Config) -> int:
    """Trajectories per prompt: `rollout.samples_per_prompt`, or 1 in a run that samples nothing."""
    objectives = DomainObjectives(config.objective).all()
    if all(objective.kind == "sft" for objective in objectives):
        return 1
    return config.rollout.samples_per_prompt


def rollout_sizes(config: Config) -> tuple[int, int]:
    """Optimizer steps per rollout batch, and prompts per rollout batch."""
    steps = config.schedule.steps_per_rollout
    return steps, steps * config.schedule.global_batch_size // samples_per_prompt(config)


class DomainObjectives:
    """The objective of every domain: the run's, overridden by the domain's own keys.

    A key that does not apply to a domain's kind is dropped if inherited, and refused if the domain sets it.
    """

    def __init__(self, objective: ObjectiveConfig):
        self.default = objective
        self._own = {domain: _override(objective, domain) for domain in objective.per_domain}

    def of(self, domain: str) -> ObjectiveConfig:
        return self._own.get(domain, self.default)

    def all(self) -> list[ObjectiveConfig]:
        """All objectives that domains may have."""
        return [self.default, *self._own.values()]

    def any(self, needs: Callable[[ObjectiveConfig], bool], domains: Iterable[str]) -> list[str]:
        """The domains, sorted, for whose objective `needs` is true."""
        return sorted(domain for domain in domains if needs(self.of(domain)))

    def heads_at_once(self, largest_mixture: int) -> int:
        """Maximum number of teacher LM heads needed at once, if a sample has at most `largest_mixture`
        teachers: a divergence between whole distributions needs all of them, log-probs of sampled tokens are
        computed one teacher after another."""
        return 1 if self.compare_tokens_only() else largest_mixture

    def compare_tokens_only(self) -> bool:
        """Whether every objective with teachers compares only sampled tokens."""
        return all(compares_tokens_only(o) for o in self.all() if needs_teachers(o))

    def check_domains(self, domains: Iterable[str]) -> None:
        """Raise `ConfigError` if an override names a domain that the data lacks."""
        domains = set(domains)
        for domain in self._own:
            if domain not in domains:
                raise ConfigError(
                    f"objective.per_domain.{domain}: no prompt has this domain{nearest(domain, domains)}"
                )


def _override(base: ObjectiveConfig, domain: str) -> ObjectiveConfig:
    own = base.per_domain[domain]
    own = own | {"add": own.get("add", {} if "kind" in own else base.add)}
    objective = dataclasses.replace(base, per_domain={}, **own)
    while True:  # dropping one key (policy_loss) can make another inapplicable (clip_eps_low)
        dropped = {
            key: _DEFAULTS[key]
            for key, (applies, _) in _APPLIES.items()
            if key not in own and getattr(objective, key) != _DEFAULTS[key] and not applies(objective)
        }
        if not dropped:
            return objective
        objective = dataclasses.replace(objective, **dropped)


def check_objectives(config: Config) -> None:
    """Raise `ConfigError` if an objective of the run is invalid by itself or with the rollout settings."""
    objective = config.objective
    _check(objective, config, "objective")
    for domain, own in objective.per_domain.items():
        for key in own:
            if key in GLOBAL_KEYS:
                raise ConfigError(
                    f"objective.per_domain.{domain}.{key}: applies to the whole run; set objective.{key}"
                )
        _check(_override(objective, domain), config, f"objective.per_domain.{domain}")


def _check(o: ObjectiveConfig, config: Config, where: str) -> None:
    if o.kind in o.add:
        raise ConfigError(f"{where}.add.{o.kind}: already the kind; set {where}.weight")
    if "sft" in kinds_of(o) and o.add:
        raise ConfigError(
            f"{where}.add: sft trains on given answers and the others on sampled responses; give sft its "
            "own domain in objective.per_domain"
        )
    _check_apply_as(o, where)
    for key, (applies, needs) in _APPLIES.items():
        if getattr(o, key) != _DEFAULTS[key] and not applies(o):
            raise ConfigError(f"{where}.{key}: does not apply to kind {_sum(o)}; it needs {needs}")
    if "top_k_kl" in kinds_of(o) and o.top_k is None:
        raise ConfigError(f"{where}.top_k: kind top_k_kl needs at least 1, found {o.top_k}")
    _check_band(o, where)
    _check_rollout(o, config, where)


def _check_apply_as(o: ObjectiveConfig, where: str) -> None:
    if o.apply_as == "advantage" and o.kind not in POLICY_KINDS:
        raise ConfigError(
            f"{where}.apply_as: {o.kind} is a loss to back-propagate (as a detached advantage the expected "
            f"gradient of a divergence is zero); advantages are: {', '.join(POLICY_KINDS)}"
        )
    if o.apply_as == "loss" and o.kind in POLICY_KINDS:
        raise ConfigError(
            f"{where}.apply_as: {o.kind} is a detached advantage (back-propagated directly, the gradient of "
            "the sampled log-ratio does not depend on the teacher); losses are: "
            f"{', '.join(VOCABULARY_KINDS)}"
        )


def _check_band(o: ObjectiveConfig, where: str) -> None:
    low, high = importance_band(o)
    if not 0 <= low < high:
        raise ConfigError(
            f"{where}.importance_low: the ratio band is reversed or empty, {low} to {high}; it needs "
            "0 <= importance_low < importance_high"
        )


def _check_rollout(o: ObjectiveConfig, config: Config, where: str) -> None:
    rollout = config.rollout
    if needs_rewards(o) and rollout.samples_per_prompt < 2:
        raise ConfigError(
            f"{where}: a group-relative advantage compares responses to one prompt; it needs "
            f"rollout.samples_per_prompt of at least 2, found {rollout.samples_per_prompt}"
        )
    if not needs_policy(o):
        return
    if rollout.top_p < 1 or rollout.top_k > 0 or rollout.temperature == 0:
        raise ConfigError(
            f"{where}: log-ratios to the sampler need samples from its whole distribution: rollout.top_p=1, "
            "rollout.top_k=0 and rollout.temperature above 0"
        )
    if any(kind in POLICY_KINDS for kind in kinds_of(o)) and rollout.temperature != o.temperature:
        raise ConfigError(
            f"{where}.temperature: an advantage belongs to the distribution that was sampled from, so it "
            f"needs rollout.temperature={rollout.temperature}, found {o.temperature}"
        )


def importance_band(objective: ObjectiveConfig) -> tuple[float, float]:
    """The band [low, high] of theta / mu; by default that of Nemotron-Cascade 2 (arXiv 2603.19220)."""
    low, high = objective.importance_low, objective.importance_high
    return (0.5 if low is None else low), (2.0 if high is None else high)


def _sum(objective: ObjectiveConfig) -> str:
    return " + ".join(kinds_of(objective))
