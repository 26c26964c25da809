"""Objectives that the configuration rejects, and how domains and recipes combine."""

from __future__ import annotations

import pytest

from megatron_mopd.config import ConfigError, DomainObjectives, config_from_dict, to_dict
from megatron_mopd.config.objectives import needs_rewards, needs_teachers, samples_per_prompt
from megatron_mopd.config.recipes import RECIPES


def build(objective=None, **sections):
    return config_from_dict({"run_dir": "unused", "objective": objective or {}, **sections})


PG = dict(kind="sampled_token")
REFUSED = [
    (dict(kind="full_vocab"), {}, "'full_vocab' is not one of .*did you mean 'full_vocab_kl'"),
    # KL as a detached advantage, and a log-ratio that is differentiated directly.
    (dict(apply_as="advantage"), {}, "expected gradient of a divergence is zero.*sampled_token, grpo"),
    (PG | dict(apply_as="loss"), {}, "does not depend on the teacher.*full_vocab_kl"),
    (dict(policy_loss="ppo_clip"), {}, "does not apply to kind full_vocab_kl.*sampled_token or grpo"),
    (dict(top_k=4), {}, "needs kind top_k_kl"),
    (dict(kind="top_k_kl"), {}, "top_k: kind top_k_kl needs at least 1"),
    (dict(outcome_reward_weight=0.1), {}, "add.grpo=WEIGHT"),
    (dict(kind="sft", rollout_correction="tis"), {}, "not sft"),
    (dict(add={"sft": 1.0}), {}, "its own domain in objective.per_domain"),
    (dict(add={"full_vocab_kl": 1.0}), {}, "already the kind"),
    (dict(add={"jsd": -1.0}), {}, "add.jsd: must be above 0"),
    (PG | dict(rollout_correction="icepop", importance_low=3.0), {}, "reversed or empty, 3.0 to 2.0"),
    (PG | dict(importance_low=0.5), {}, "needs rollout_correction tis, icepop"),
    (dict(kind="grpo"), {}, "samples_per_prompt of at least 2, found 1"),
    (PG | dict(outcome_reward_weight=0.1), {}, "samples_per_prompt of at least 2"),
    (PG, dict(rollout=dict(top_p=0.9)), "rollout.top_p=1"),
    (dict(rollout_correction="tis"), dict(rollout=dict(temperature=0.0)), "temperature above 0"),
    (PG, dict(rollout=dict(temperature=0.7)), "needs rollout.temperature=0.7, found 1.0"),
    (PG | dict(shaping=1.5), {}, "above 0 and at most 1"),
    (dict(reduction="mean"), {}, "token_mean, sequence_mean, domain_mean"),
    (dict(per_domain={"a": {"reduction": "token_mean"}}), {}, "applies to the whole run"),
    (dict(per_domain={"a": {"knd": "jsd"}}), {}, "unknown key 'objective.per_domain.a.knd'.*'kind'"),
    (dict(per_domain={"a": {"kind": "sft", "top_k": 3}}), {}, "objective.per_domain.a.top_k"),
    (dict(per_domain={"a": {"recipe": "glm"}}), {}, "unknown recipe 'glm'.*did you mean 'glm5'"),
]


@pytest.mark.parametrize("objective, sections, message", REFUSED)
def test_refused_in_one_sentence(objective, sections, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(objective, **sections)
    assert "\n" not in str(error.value)


def test_unknown_recipe():
    with pytest.raises(ConfigError, match="unknown recipe 'deepseek'.*did you mean 'deepseek_v4'"):
        build(recipe="deepseek")


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_fill_in_what_is_not_set(name):
    config = build(recipe=name, optimizer=dict(lr=1.0))
    assert config.optimizer.lr == 1.0
    assert config.objective.kind == RECIPES[name]["objective"]["kind"]
    assert config.schedule.train_iters == RECIPES[name]["schedule"]["train_iters"]
    assert config_from_dict(to_dict(config)) == config


def test_domains_override_and_inherit():
    objective = dict(
        kind="sampled_token",
        outcome_reward_weight=0.1,
        rollout_correction="icepop",
        importance_high=1.5,
        log_ratio_clamp=2.0,
        per_domain={
            "code": "deepseek_v4",
            "chat": "jsd",
            "answers": {"kind": "sft"},
            "math": {"importance_high": 3.0},
            "mixed": {"recipe": "nemotron_cascade2", "log_ratio_clamp": 1.0},
        },
    )
    config = build(objective, rollout=dict(samples_per_prompt=2))
    of = DomainObjectives(config.objective).of
    assert of("elsewhere") is config.objective
    # Inherited keys that apply to the kind are kept, the others are dropped.
    assert (of("chat").kind, of("chat").rollout_correction, of("chat").log_ratio_clamp) == (
        "jsd",
        "icepop",
        None,
    )
    assert (of("answers").rollout_correction, of("answers").importance_high) == ("none", None)
    assert (of("math").importance_high, of("math").outcome_reward_weight) == (3.0, 0.1)
    assert (of("mixed").importance_high, of("mixed").log_ratio_clamp) == (2.0, 1.0)
    assert of("code").kind == "full_vocab_kl"
    objectives = DomainObjectives(config.objective)
    domains = ["answers", "chat", "math"]
    assert objectives.any(needs_teachers, domains) == ["chat", "math"]
    assert objectives.any(needs_rewards, domains) == ["math"]
    with pytest.raises(ConfigError, match="per_domain.mixed: no prompt has this domain"):
        objectives.check_domains(["answers", "chat", "math", "code"])
    assert config_from_dict(to_dict(config)) == config


def test_given_answers_are_not_repeated():
    assert samples_per_prompt(build(dict(kind="sft"), rollout=dict(samples_per_prompt=4))) == 1
    assert samples_per_prompt(build(rollout=dict(samples_per_prompt=4))) == 4
