"""What to watch in a rollout batch and over the run, per domain, and what to raise the alarm about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mopd.data.trajectory import Trajectory

KL_CEILING = 5.0
"""Mean KL per token above which teacher and student have hardly anything in common (another tokenizer's ids,
a wrong checkpoint). Same-origin teachers start near 0.04, foreign ones near 0.2 (arXiv 2606.30406)."""
KL_GROWTH = 3.0
"""A domain's KL this many times above the lowest it has had means that the student is moving away."""
KL_NOISE = 0.02
"""KL below which growth means nothing."""
ENTROPY_COLLAPSE = 0.1
"""Share of the first batch's entropy below which sampling has become deterministic."""
ALWAYS_CUT = 0.9
"""Share of responses that run into the length limit above which stop tokens are out of reach."""
GRADIENT_SPIKE = 30.0
"""Norm of the gradient, relative to the typical one so far, that a bad batch or broken hardware explains
better than training does."""
_STEPS_TO_KNOW = 3
"""Steps before a gradient's norm is compared with the typical one."""
FEWEST_VERDICTS = 64
"""So many verdicts of a domain in a row have to be equal before the reward counts as constant."""


def rollout_metrics(
    trajectories: Sequence[Trajectory], rewards: Mapping[int, float | None]
) -> dict[str, float]:
    """Per domain: mean length, share cut off, one-sample entropy per token, mean reward, missing rewards."""
    metrics = {}
    for domain in sorted({t.domain for t in trajectories}):
        mine = [t for t in trajectories if t.domain == domain]
        metrics[f"length/{domain}"] = sum(len(t.response_ids) for t in mine) / len(mine)
        logprobs = [value for t in mine for value in t.logprobs or ()]
        if logprobs:
            metrics[f"unfinished/{domain}"] = sum(not t.finished for t in mine) / len(mine)
            metrics[f"rollout_entropy/{domain}"] = -math.fsum(logprobs) / len(logprobs)
        judged = [rewards[t.index] for t in mine if t.index in rewards]
        verdicts = [reward for reward in judged if reward is not None]
        if verdicts:
            metrics[f"reward/{domain}"] = sum(verdicts) / len(verdicts)
        if len(verdicts) < len(judged):
            metrics[f"reward_missing/{domain}"] = len(judged) - len(verdicts)
    return metrics


class Alarms:
    """Messages about a run that is going wrong, each once per domain: what a batch may cross and recross by
    chance (entropy, growth of the KL) once per run, the rest until it has been fine again.
    """

    def __init__(self):
        self._raised: set[str] = set()
        self._lowest_kl: dict[str, float] = {}
        self._first_entropy: dict[str, float] = {}
        self._equal: dict[str, tuple[float, int]] = {}
        self._failed: dict[str, int] = {}
        self._typical_gradient = (0.0, 0)  # moving mean of the norm's logarithm, steps in it

    def state_dict(self) -> dict[str, Any]:
        """What has been seen so far, in plain containers: a resumed run raises the same alarms."""
        return {
            "raised": sorted(self._raised),
            "lowest_kl": dict(self._lowest_kl),
            "first_entropy": dict(self._first_entropy),
            "equal": {domain: list(seen) for domain, seen in self._equal.items()},
            "failed": dict(self._failed),
            "typical_gradient": list(self._typical_gradient),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._raised = set(state["raised"])
        self._lowest_kl = dict(state["lowest_kl"])
        self._first_entropy = dict(state["first_entropy"])
        self._equal = {domain: (value, count) for domain, (value, count) in state["equal"].items()}
        self._failed = dict(state["failed"])
        mean, steps = state.get("typical_gradient", (0.0, 0))  # checkpoints of before have none
        self._typical_gradient = mean, steps

    def rollout(
        self,
        trajectories: Sequence[Trajectory],
        rewards: Mapping[int, float | None],
        metrics: Mapping[str, float],
    ) -> list[str]:
        """What the `rollout_metrics` of a rollout batch say."""
        alarms = []
        for domain in sorted({t.domain for t in trajectories}):
            judged = [rewards[t.index] for t in trajectories if t.domain == domain and t.index in rewards]
            verdicts = [reward for reward in judged if reward is not None]
            if verdicts:
                value, count = self._equal.get(domain, (verdicts[0], 0))
                is_constant = set(verdicts) == {value}
                self._equal[domain] = (verdicts[-1], count + len(verdicts) if is_constant else 0)
            value, count = self._equal.get(domain, (0.0, 0))
            alarms += self._once(
                f"reward {domain}",
                count >= FEWEST_VERDICTS,
                f"the last {count} rewards of domain {domain!r} are all {value}: there is nothing to learn "
                "from them; does its verifier understand the answers?",
            )
            failed = 0 if verdicts else self._failed.get(domain, 0) + len(judged)
            self._failed[domain] = failed
            alarms += self._once(
                f"missing {domain}",
                failed >= FEWEST_VERDICTS,
                f"the verifier of domain {domain!r} failed on the last {failed} responses",
            )
            cut = metrics.get(f"unfinished/{domain}", 0.0)
            alarms += self._once(
                f"cut {domain}",
                cut > ALWAYS_CUT,
                f"{cut:.0%} of the responses of domain {domain!r} run into rollout.max_new_tokens",
            )
            entropy = metrics.get(f"rollout_entropy/{domain}")
            if entropy is not None:
                first = self._first_entropy.setdefault(domain, entropy)
                alarms += self._once(
                    f"entropy {domain}",
                    entropy < ENTROPY_COLLAPSE * first,
                    f"the entropy of domain {domain!r} fell from {first:.3g} to {entropy:.3g} nats per token",
                    again=False,
                )
        return alarms

    def step(self, metrics: Mapping[str, float]) -> list[str]:
        """What the metrics of an optimizer step say: its gradient, the divergence from the teachers."""
        alarms = self._gradient(metrics.get("grad_norm", 0.0))
        for key, value in metrics.items():
            if not key.startswith("kl/"):
                continue
            domain = key.removeprefix("kl/")
            lowest = min(self._lowest_kl.get(domain, value), value)
            self._lowest_kl[domain] = lowest
            alarms += self._once(
                f"ceiling {domain}",
                value > KL_CEILING,
                f"the KL of domain {domain!r} is {value:.2f} nats per token: is its teacher the right one?",
            )
            alarms += self._once(
                f"growth {domain}",
                value > KL_GROWTH * max(lowest, KL_NOISE),
                f"the KL of domain {domain!r} has grown from {lowest:.3g} to {value:.3g}: a smaller "
                "optimizer.lr, or rollout_correction when rollouts are stale, may help",
                again=False,
            )
        return alarms

    def _gradient(self, norm: float) -> list[str]:
        if not (math.isfinite(norm) and norm > 0):
            return []
        mean, steps = self._typical_gradient
        typical = math.exp(mean)
        is_spike = steps >= _STEPS_TO_KNOW and norm > GRADIENT_SPIKE * typical
        # At most a spike's worth goes into the mean, so that one bad step does not hide the next.
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
        """`message` when `holds` begins to be true; with `again` also after it was false in between."""
        if not holds:
            if again:
                self._raised.discard(key)
            return []
        if key in self._raised:
            return []
        self._raised.add(key)
        return [message]
