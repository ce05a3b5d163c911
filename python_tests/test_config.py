"""QuickSilverConfig: every value checked when it is made, and JSON that comes back the same."""

import json

import pytest
import torch

from quicksilver_ext.config import AMQConfig, FusionConfig, HaltingConfig, QuickSilverConfig

HALTING = {"drift_threshold": 0.2}
FUSION = {"layer": 1, "threshold": 0.5}
AMQ = {"layer": 1, "entropy_threshold": 0.5}


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({"halting": {"drift_threshold": float("nan")}}, "halting.drift_threshold"),
        ({"halting": {"drift_threshold": -0.1}}, "halting.drift_threshold"),
        ({"halting": {"drift_threshold": "0.1"}}, "halting.drift_threshold"),
        ({"halting": {"drift_threshold": True}}, "halting.drift_threshold"),
        ({"halting": {**HALTING, "entropy_threshold": float("nan")}}, "halting.entropy_threshold"),
        ({"halting": {**HALTING, "drift_norm": "l2"}}, "halting.drift_norm"),
        ({"halting": {**HALTING, "entropy_source": "logits"}}, "halting.entropy_source"),
        ({"halting": {**HALTING, "min_layer": 0}}, "halting.min_layer"),
        ({"halting": {**HALTING, "min_layer": 1.5}}, "halting.min_layer"),
        ({"halting": {**HALTING, "sink_tokens": -1}}, "halting.sink_tokens"),
        ({"halting": {**HALTING, "state": "cold"}}, "halting.state"),
        ({"halting": {**HALTING, "kv_policy": "drop"}}, "halting.kv_policy"),
        ({"halting": {**HALTING, "min_layer": 3, "resume_layer": 3}}, "halting.resume_layer"),
        ({"halting": {**HALTING, "resume_layer": 3, "kv_policy": "recompute"}}, "recompute"),
        ({"halting": {**HALTING, "depth": 3}}, "halting.depth"),
        ({"halting": {}}, "drift_threshold"),
        ({"halting": [1]}, "halting"),
        ({"fusion": {**FUSION, "threshold": float("inf"), "layer": -1}}, "fusion.layer"),
        ({"fusion": {**FUSION, "weights": "mean"}}, "fusion.weights"),
        ({"fusion": {**FUSION, "scope": "all"}}, "fusion.scope"),
        ({"fusion": {**FUSION, "max_group": 1}}, "fusion.max_group"),
        ({"fusion": {**FUSION, "layer": 0, "weights": "attention"}}, "fusion.weights"),
        ({"amq": {**AMQ, "entropy_threshold": float("nan")}}, "amq.entropy_threshold"),
        ({"amq": {**AMQ, "entropy_source": "none"}}, "amq.entropy_source"),
        ({"speculation": {}}, "speculation"),
        ({"trace": 1}, "trace"),
        ({"halting": {**HALTING, "kv_policy": "recompute"}, "fusion": {**FUSION, "scope": "cache"}}, "recompute"),
    ],
)
def test_bad_values_name_their_field(values: dict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        QuickSilverConfig.from_dict(values)


def test_dict_and_folder_round_trip(tmp_path) -> None:
    tensors = {"translator.2.weight": torch.randn(4, 4), "translator.2.bias": torch.randn(4)}
    config = QuickSilverConfig(
        HaltingConfig(0.3, kv_policy="zero"), FusionConfig(2, 0.5, scope="cache"), AMQConfig(3, 0.25), True, tensors
    )
    assert QuickSilverConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    config.save_pretrained(tmp_path)
    again = QuickSilverConfig.from_pretrained(tmp_path)
    assert again == config
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in tensors.items())
    assert QuickSilverConfig.from_pretrained(tmp_path / "quicksilver_config.json") == config


def test_presets() -> None:
    off, paper = QuickSilverConfig.preset("off"), QuickSilverConfig.preset("paper")
    assert (off.halting, off.fusion, off.amq) == (None, None, None)
    assert paper.halting is not None and paper.fusion is not None and paper.amq is not None
    assert (paper.halting.drift_threshold, paper.halting.entropy_threshold) == (0.045, 1.15)
    assert (paper.fusion.layer, paper.amq.layer) == (12, 15)
    with pytest.raises(ValueError, match="preset must be one of"):
        QuickSilverConfig.preset("fast")


def test_missing_and_broken_files(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"no quicksilver_config\.json"):
        QuickSilverConfig.from_pretrained(tmp_path)
    (tmp_path / "quicksilver_config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        QuickSilverConfig.from_pretrained(tmp_path)


def test_what_a_model_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"fusion\.layer is 12"):
        QuickSilverConfig.preset("paper").check_model(5, 64)
    translated = QuickSilverConfig(HaltingConfig(0.1, state="translated", min_layer=2))
    with pytest.raises(ValueError, match=r"translator\.2\.weight"):
        translated.check_model(4, 8)
    wrong = {"translator.2.weight": torch.zeros(8, 7), "translator.2.bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"must have shape \[8, 8\]"):
        QuickSilverConfig(HaltingConfig(0.1, state="translated", min_layer=2), tensors=wrong).check_model(3, 8)
    with pytest.raises(ValueError, match=r"probe\.1\.weight"):
        QuickSilverConfig(amq=AMQConfig(1, 0.5, "probe")).check_model(4, 8)
