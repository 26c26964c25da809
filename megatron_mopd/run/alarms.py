"""Per-domain metrics of a rollout batch and of the run, and the conditions that raise an alarm.

A domain may have thirty tokens in a step, so that its mean is mostly noise, and the worst of a dozen domains
over hundreds of steps is pure noise. Alarms therefore compare means over the most recent steps that together
have enough tokens, and only where the means differ by more than their standard errors explain
(`recent_means.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mopd.data.trajectory import Trajectory
from megatron_mopd.run.recent_means import RecentMean

KL_CEILING = 5.0
"""Mean KL per token above which teacher and student have hardly anything in common (another tokenizer's ids,
a wrong checkpoint). Same-origin teachers start near 0.04, foreign ones near 0.2 (arXiv 2606.30406)."""
KL_GROWTH = 3.0
"""A domain's KL this many times above its lowest so far means that the student is moving away."""
KL_NOISE = 0.1
"""KL below which growth is ignored: that of `self` starts at 0 and grows as soon as the student learns."""
ENTROPY_COLLAPSE = 0.1
"""Fraction of the first steps' entropy, and of the teachers' cross-entropy on the same tokens, below which
sampling has become deterministic although the teachers are not."""
POOR_REWARD = 0.8
"""Mean reward below which determinism in a domain without teachers is not explained by mastery."""
ALWAYS_CUT = 0.9
"""Fraction of responses cut off at the length limit above which stop tokens are out of reach."""
FEWEST_RESPONSES = 64
"""Responses of a domain over which that fraction is computed."""
GRADIENT_SPIKE = 30.0
"""Gradient norm, relative to the typical norm so far, above which a bad batch or broken hardware is the more
likely explanation."""
_STEPS_TO_KNOW = 3
"""Steps before a gradient's norm is compared with the typical one."""
FEWEST_VERDICTS = 256
"""Consecutive verdicts of a domain that must be equal before the reward counts as constant."""
_CHANCE = 1e-6
"""A run of zeros less likely than this, given the earlier rewards, is not chance."""


def rollout_metrics(
    trajectories: Sequence[Trajectory], rewards: Mapping[int, float | None]
) -> dict[str, float]:
    """Per domain: mean length, fraction cut off, one-sample entropy per token, mean and missing rewards.

    Needs no tokens, and is equal on every rank.
    """
    metrics = {}
    for domain in sorted({t.domain for t in trajectories}):
        mine = [t for t in trajectories if t.domain == domain]
        metrics[f"length/{domain}"] = sum(t.response_length for t in mine) / len(mine)
        sampled = [t for t in mine if t.is_sampled]
        if tokens := sum(t.response_length for t in sampled):
            metrics[f"unfinished/{domain}"] = sum(not t.finished for t in mine) / len(mine)
            metrics[f"rollout_entropy/{domain}"] = -math.fsum(t.logprob_sum for t in sampled) / tokens
        judged = [rewards[t.index] for t in mine if t.index in rewards]
        verdicts = [reward for reward in judged if reward is not None]
        if verdicts:
            metrics[f"reward/{domain}"] = sum(verdicts) / len(verdicts)
        if len(verdicts) < len(judged):
            metrics[f"reward_missing/{domain}"] = len(judged) - len(verdicts)
    return metrics


class Alarms:
    """Messages about a run that is going wrong, each once per domain. Quantities that may cross their limit
    repeatedly (entropy, growth of the KL) raise one alarm per run; the others raise another one after they
    have been normal again.
    """

    def __init__(self):
        self._raised: set[str] = set()
        self._kl: dict[str, RecentMean] = {}
        self._lowest_kl: dict[str, tuple[float, float]] = {}  # mean and its upper bound
        self._entropy: dict[str, RecentMean] = {}
        self._first_entropy: dict[str, tuple[float, float]] = {}  # mean and its lower bound
        self._cut: dict[str, tuple[int, int]] = {}  # cut, judged
        self._equal: dict[str, tuple[float, int]] = {}
        self._before: dict[str, tuple[float, int]] = {}  # sum and number of the verdicts before those
        self._failed: dict[str, int] = {}
        self._typical_gradient = (0.0, 0)  # moving mean of the norm's logarithm, steps in it

    def state_dict(self) -> dict[str, Any]:
        """The observations so far, in plain containers, so that a resumed run raises the same alarms."""
        return {
            "raised": sorted(self._raised),
            "recent_kl": {domain: mean.state() for domain, mean in self._kl.items()},
            "lowest_recent_kl": {domain: list(lowest) for domain, lowest in self._lowest_kl.items()},
            "recent_entropy": {domain: mean.state() for domain, mean in self._entropy.items()},
            "first_recent_entropy": {domain: list(first) for domain, first in self._first_entropy.items()},
            "cut": {domain: list(counts) for domain, counts in self._cut.items()},
            "equal": {domain: list(seen) for domain, seen in self._equal.items()},
            "before": {domain: list(counts) for domain, counts in self._before.items()},
            "failed": dict(self._failed),
            "typical_gradient": list(self._typical_gradient),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict`. Entries that older checkpoints lack start empty."""

        def pairs(name: str) -> dict[str, tuple]:
            return {domain: tuple(pair) for domain, pair in state.get(name, {}).items()}

        def means(name: str) -> dict[str, RecentMean]:
            return {domain: RecentMean(steps) for domain, steps in state.get(name, {}).items()}

        self._raised = set(state["raised"])
        self._kl, self._entropy = means("recent_kl"), means("recent_entropy")
        self._lowest_kl, self._first_entropy = pairs("lowest_recent_kl"), pairs("first_recent_entropy")
        self._cut, self._equal, self._before = pairs("cut"), pairs("equal"), pairs("before")
        self._failed = dict(state["failed"])
        mean, steps = state.get("typical_gradient", (0.0, 0))
        self._typical_gradient = mean, steps

    def rollout(
        self,
        trajectories: Sequence[Trajectory],
        rewards: Mapping[int, float | None],
        metrics: Mapping[str, float],
    ) -> list[str]:
        """The alarms of a rollout batch and its rewards; `metrics` are its `rollout_metrics`."""
        alarms = []
        for domain in sorted({t.domain for t in trajectories}):
            mine = [t for t in trajectories if t.domain == domain]
            judged = [rewards[t.index] for t in mine if t.index in rewards]
            alarms += self._rewards(domain, judged)
            if f"unfinished/{domain}" in metrics:
                alarms += self._cut_off(domain, mine)
        return alarms

    def step(self, metrics: Mapping[str, float]) -> list[str]:
        """The alarms of an optimizer step: gradient norm, divergence from the teachers, entropy.

        `tokens/DOMAIN` is the number of tokens behind a domain's means; without it they are taken as exact.
        """
        alarms = self._gradient(metrics.get("grad_norm", 0.0))
        for key, value in metrics.items():
            kind, _, domain = key.partition("/")
            if kind in ("kl", "rollout_entropy") and math.isfinite(value):
                tokens = metrics.get(f"tokens/{domain}", math.inf)
                means = self._kl if kind == "kl" else self._entropy
                means.setdefault(domain, RecentMean()).add(value, tokens)
                if kind == "kl":
                    alarms += self._divergence(domain)
        for domain in sorted(self._entropy):
            if f"rollout_entropy/{domain}" in metrics:
                alarms += self._collapse(domain, metrics.get(f"reward/{domain}", 0.0))
        return alarms

    def _rewards(self, domain: str, judged: Sequence[float | None]) -> list[str]:
        verdicts = [reward for reward in judged if reward is not None]
        for verdict in verdicts:
            value, count = self._equal.get(domain, (verdict, 0))
            if verdict != value:
                total, number = self._before.get(domain, (0.0, 0))
                self._before[domain] = total + count * value, number + count
                value, count = verdict, 0
            self._equal[domain] = value, count + 1
        value, count = self._equal.get(domain, (0.0, 0))
        total, number = self._before.get(domain, (0.0, 0))
        # A domain that had other rewards earlier and now only gets the best one is mastered. A run of zeros
        # may be chance: this bounds the probability that all `total` successes so far come before the run.
        is_stuck = not number or 0.0 < value < 1.0
        is_stuck |= value == 0.0 and (number / max(1, number + count)) ** total < _CHANCE
        failed = 0 if verdicts else self._failed.get(domain, 0) + len(judged)
        self._failed[domain] = failed
        return self._once(
            f"reward {domain}",
            count >= FEWEST_VERDICTS and is_stuck,
            f"the last {count} rewards of domain {domain!r} are all {value}: there is nothing to learn "
            "from them; does its verifier understand the answers?",
        ) + self._once(
            f"missing {domain}",
            failed >= FEWEST_VERDICTS,
            f"the verifier of domain {domain!r} failed on the last {failed} responses",
        )

    def _cut_off(self, domain: str, trajectories: Sequence[Trajectory]) -> list[str]:
        cut, total = self._cut.get(domain, (0, 0))
        cut += sum(not t.finished for t in trajectories)
        total += len(trajectories)
        if total < FEWEST_RESPONSES:
            self._cut[domain] = cut, total
            return []
        self._cut[domain] = 0, 0
        return self._once(
            f"cut {domain}",
            cut > ALWAYS_CUT * total,
            f"{cut / total:.0%} of the responses of domain {domain!r} have no stop token: "
            "rollout.max_new_tokens or repetition_stop ended them",
        )

    def _divergence(self, domain: str) -> list[str]:
        if (known := self._kl[domain].bounds()) is None:
            return []
        mean, low, high = known
        alarms = self._once(
            f"ceiling {domain}",
            low > KL_CEILING,
            f"the KL of domain {domain!r} is {mean:.2f} nats per token: is its teacher the right one? "
            "or is optimizer.lr too large?",
        )
        lowest, lowest_high = self._lowest_kl.get(domain, (mean, high))
        if high <= lowest_high:
            lowest, lowest_high = mean, high
        self._lowest_kl[domain] = lowest, lowest_high
        return alarms + self._once(
            f"growth {domain}",
            low > KL_GROWTH * max(lowest_high, KL_NOISE),
            f"the KL of domain {domain!r} has grown from {lowest:.3g} to {mean:.3g}: a smaller "
            "optimizer.lr, or rollout_correction when rollouts are stale, may help",
            again=False,
        )

    def _collapse(self, domain: str, reward: float) -> list[str]:
        """The student has become deterministic but its teachers have not: their cross-entropy on the
        student's tokens, which is the student's entropy plus the KL, is much larger. In a domain without
        teachers, the rewards distinguish collapse from mastery."""
        if (known := self._entropy[domain].bounds()) is None:
            return []
        mean, low, high = known
        first, first_low = self._first_entropy.setdefault(domain, (mean, low))
        alone = reward < POOR_REWARD
        against = ""
        if domain in self._kl:
            kl = self._kl[domain].bounds()
            alone = kl is not None and kl[1] > max(KL_NOISE, (1 / ENTROPY_COLLAPSE - 1) * high)
            against = f", against a cross-entropy of {mean + kl[0]:.3g} of its teachers" if kl else ""
        return self._once(
            f"entropy {domain}",
            alone and high < ENTROPY_COLLAPSE * first_low,
            f"the entropy of domain {domain!r} fell from {first:.3g} to {mean:.3g} nats per token{against}",
            again=False,
        )

    def _gradient(self, norm: float) -> list[str]:
        if not (math.isfinite(norm) and norm > 0):
            return []
        mean, steps = self._typical_gradient
        typical = math.exp(mean)
        is_spike = steps >= _STEPS_TO_KNOW and norm > GRADIENT_SPIKE * typical
        # The mean takes the norm clipped at the spike threshold, so that one bad step does not hide the next.
        limited = min(norm, GRADIENT_SPIKE * typical) if steps else norm
        weight = max(0.05, 1 / (steps + 1))
        self._typical_gradient = mean + weight * (math.log(limited) - mean), steps + 1
        return self._once(
            "gradient",
            is_spike,
            f"the gradient's norm is {norm:.3g}, {norm / typical:.0f} times the usual {typical:.3g}: a batch "
            "unlike the others, too large an optimizer.lr, or broken hardware",
        )

    def _once(self, key: str, holds: bool, message: str, again: bool = True) -> list[str]:
        """`message` when `holds` first becomes true; with `again`, each time it becomes true."""
        if not holds:
            if again:
                self._raised.discard(key)
            return []
        if key in self._raised:
            return []
        self._raised.add(key)
        return [message]
