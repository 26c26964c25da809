"""Identities that files of earlier releases contain: resumed runs compare their own with them."""

import hashlib
import json

import numpy as np

from megatron_mopd.data.prompt import Prompt
from megatron_mopd.data.prompts import PromptSet
from megatron_mopd.run.rollout_logs import rollout_identity

IDS = [(5, 70_000, 2), (1,), (2**31 - 1, 0)]


def prompts():
    return [Prompt("x", np.array(ids), "d", f"{n}\u00e9", "none", index=n) for n, ids in enumerate(IDS)]


def test_a_rollout_batch_has_the_identity_of_its_json_text():
    sources = {"batch": 3, "seed": 7, "weights": -12, "rollout": "RolloutConfig(temperature=1.0)"}
    for count in (1, 3):
        text = json.dumps(sources | {"prompts": IDS[:count]})
        assert rollout_identity(sources, prompts()[:count]) == hashlib.sha256(text.encode()).hexdigest()


def test_a_source_has_the_fingerprint_of_plain_numbers():
    digest = hashlib.sha256()
    for n, ids in enumerate(IDS):
        digest.update(repr((ids, "d", f"{n}\u00e9", "none")).encode())
    assert PromptSet((tuple(prompts()),), (1.0,)).source_fingerprints() == [digest.hexdigest()]
