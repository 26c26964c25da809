"""Routing: the teachers of a domain, their weights at each iteration, and what is refused."""

import pytest

from megatron_mopd.config import ConfigError, TeacherConfig, config_from_dict
from megatron_mopd.teachers.routing import Routing, check_teachers

TEACHERS = [TeacherConfig("math", "m"), TeacherConfig("code", "c"), TeacherConfig("self")]


def mixture(routing, domain, iteration=0):
    return Routing(routing, TEACHERS).at(iteration).mixture(domain)


def test_a_domain_takes_its_own_entry_then_the_longest_wildcard_then_the_default():
    routing = {
        "default": "self",
        "code/*": "code",
        "code/sql*": {"math": 1},
        "code/sql": {"code": 2},
        "*": "math",
    }
    assert mixture(routing, "code/sql") == (("code", 2.0),)
    assert mixture(routing, "code/sqlite") == (("math", 1.0),)
    assert mixture(routing, "code/python") == (("code", 1.0),)
    assert mixture(routing, "chat") == (("math", 1.0),)
    del routing["*"]
    assert mixture(routing, "chat") == (("self", 1.0),)
    del routing["default"]
    with pytest.raises(ConfigError, match="'chat' has no teacher and there is no routing.default"):
        mixture(routing, "chat")


def test_teachers_that_score_at_any_iteration():
    routing = {"default": "self", "chat": {"math": {0: 1.0, 5: 0.0}, "code": {0: 0.0, 5: 1.0}}}
    assert Routing(routing, TEACHERS).scorers(["chat"]) == {"math", "code"}
    assert Routing(routing, TEACHERS).scorers(["chat", "poems"]) == {"math", "code", "self"}
    assert Routing({"chat": "math"}, TEACHERS).scorers(["poems"]) == set()


def test_of_equally_specific_wildcards_the_first_counts():
    assert mixture({"a*": "math", "*b": "code"}, "ab") == (("math", 1.0),)
    assert mixture({"*b": "code", "a*": "math"}, "ab") == (("code", 1.0),)


def test_weights_are_linear_between_the_given_iterations():
    routing = {"chat": {"math": {10: 1.0, 20: 0.5, 40: 0.0}, "code": {20: 0, 40: 2.0}, "self": 0}}
    assert mixture(routing, "chat", 0) == (("math", 1.0),)
    assert mixture(routing, "chat", 15) == (("math", 0.75),)
    assert mixture(routing, "chat", 30) == (("code", 1.0), ("math", 0.25))
    assert mixture(routing, "chat", 40) == (("code", 2.0),)
    assert mixture(routing, "chat", 10**6) == (("code", 2.0),)
    assert Routing(routing, TEACHERS).max_teachers == 2
    # Routing keeps no state between iterations, so a resumed run gets the same weights.
    shared = Routing(routing, TEACHERS)
    shared.at(40)
    assert shared.mixture("chat") == (("math", 1.0),)


def test_a_schedule_survives_the_configuration_file(tmp_path):
    from megatron_mopd.config import load_config, save_config

    routing = {"chat": {"math": {10: 1.0, 20: 0.5}}, "default": "self"}
    save_config(config_from_dict({"run_dir": "x", "routing": routing}), tmp_path / "config.yaml")
    again = load_config(tmp_path / "config.yaml").routing
    assert Routing(again, TEACHERS).at(15).mixture("chat") == (("math", 0.75),)


@pytest.mark.parametrize(
    "routing, message",
    [
        ({"chat": {"maths": 1}}, "routing.chat: unknown teacher 'maths'; did you mean 'math'"),
        ({"chat": {"math": -0.5}}, "routing.chat.math: expected a weight of at least 0, found -0.5"),
        ({"chat": {"math": float("nan")}}, "weight of at least 0"),
        ({"chat": {"math": True}}, "weight of at least 0"),
        ({"chat": {"math": 0, "code": 0.0}}, "routing.chat: all weights are zero;"),
        ({"chat": {"math": {0: 1, 50: 0}, "code": {0: 1, 60: 0}}}, "all weights are zero at iteration 60"),
        ({"chat": {"math": {"soon": 1}}}, "iteration -> weight, found 'soon'"),
        ({"chat": {"math": {0: -1}}}, "routing.chat.math.0: expected a weight of at least 0"),
        ({"chat": []}, "expected a teacher's name or a mapping"),
    ],
)
def test_what_is_refused(routing, message):
    with pytest.raises(ConfigError, match=message):
        Routing(routing, TEACHERS)


def test_entries_must_serve_a_domain():
    with pytest.raises(ConfigError, match="routing.chatt: no prompt has this domain; did you mean 'chat'"):
        Routing({"chatt": "math", "default": "self"}, TEACHERS).check(["chat"])
    with pytest.raises(ConfigError, match=r"routing.code/\*: matches no domain of the prompts \(chat\)"):
        Routing({"code/*": "math", "default": "self"}, TEACHERS).check(["chat"])
    Routing({"c*": "math"}, TEACHERS).check(["chat", "code"])


@pytest.mark.parametrize(
    "teachers, message",
    [
        ([TeacherConfig("math", "m"), TeacherConfig("math", "n")], "'math' is used twice"),
        ([TeacherConfig("", "m")], r"teachers\[0\].name: missing"),
        ([TeacherConfig("math")], "load: missing; name the checkpoint directory of 'math'"),
        ([TeacherConfig("self", "m")], "takes no `load`"),
        ([TeacherConfig("math", "m", kl_floor=2.0, kl_ceiling=1.0)], "0 <= kl_floor < kl_ceiling"),
    ],
)
def test_teachers_that_are_refused(teachers, message):
    with pytest.raises(ConfigError, match=message):
        check_teachers(teachers)
