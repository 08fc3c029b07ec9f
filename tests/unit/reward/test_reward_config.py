"""What a reward server's settings may say, and how wrong ones are refused."""

import pytest

from trimtab.reward.config import RewardConfig
from trimtab.runtime.config import ConfigError, load_config

RULE = {"kind": "length"}


def test_one_model_in_a_few_words_is_a_scorer_of_its_own():
    config = RewardConfig(model="folder", dtype="bfloat16", timeout_s=3, scorers={"short": RULE}, default="model")
    (name, model), (other, _) = config.all_scorers().items()
    assert (name, other) == ("model", "short")
    assert (model.kind, model.model, model.dtype, model.timeout_s) == ("model", "folder", "bfloat16", 3)


def test_scorers_come_from_yaml_with_the_default_first(tmp_path):
    path = tmp_path / "reward.yaml"
    path.write_text(
        "scorers:\n"
        "  helpful: {kind: model, model: rewards/helpful}\n"
        "  short: {kind: length, at_most: 50}\n"
        "  blend: {kind: sum, weights: {helpful: 1.0, short: 0.5}}\n"
        "default: blend\n"
    )
    found = load_config(RewardConfig, path).all_scorers()
    assert [(name, settings.kind) for name, settings in found.items()] == [
        ("blend", "sum"),
        ("helpful", "model"),
        ("short", "length"),
    ]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "model: is required, or scorers"),
        ({"scorers": {"a": RULE, "b": RULE}}, "default: say which of a, b"),
        ({"scorers": {"a": RULE}, "default": "z"}, "default: z is none of a"),
        ({"model": "m", "scorers": {"model": RULE}, "default": "model"}, "scorers.model"),
        ({"scorers": {"a b": RULE}}, "scorers"),
        ({"scorers": {"a": {"kind": "regex", "pattern": "("}}}, "no regular expression"),
        ({"scorers": {"a": {"kind": "answer", "pattern": "x"}}}, "no group"),
        ({"scorers": {"a": {"kind": "length", "at_least": 3, "at_most": 2}}}, "at_least"),
        ({"scorers": {"a": {"kind": "function", "function": "nothing"}}}, "function"),
        ({"scorers": {"a": {"kind": "magic"}}}, "kind"),
        ({"scorers": {"s": {"kind": "sum", "weights": {"x": 1}}}}, r"scorers.s.weights: x is none of s"),
        (
            {
                "scorers": {
                    "a": RULE,
                    "s": {"kind": "sum", "weights": {"a": 1}},
                    "t": {"kind": "sum", "weights": {"s": 1}},
                },
                "default": "t",
            },
            "s is a sum itself",
        ),
        ({"scorers": {"a": {"kind": "model", "model": "version:r/n"}}}, "scorers.a.model: .* needs a store"),
    ],
)
def test_wrong_settings_are_refused_with_the_reason(settings, reason):
    with pytest.raises(ConfigError, match=reason):
        load_config(RewardConfig, None, settings)
