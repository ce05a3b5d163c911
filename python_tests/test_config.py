"""QuickSilverConfig: every value checked when it is made, and JSON that comes back the same."""

import json

import numpy as np
import pytest
import torch
from models import TRAINED_GPT2

from quicksilver_ext import QuickSilverForCausalLM
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
        ({"halting": {"drift_threshold": 10**400}}, "halting.drift_threshold must be a number of at least 0"),
        ({"halting": {"drift_threshold": 10**5000}}, "halting.drift_threshold must be a number of at least 0"),
        ({"halting": {"drift_threshold": -(10**400)}}, "halting.drift_threshold"),
        ({"halting": {"drift_threshold": None}}, "halting.drift_threshold"),
        ({"halting": {"drift_threshold": [0.1]}}, "halting.drift_threshold"),
        ({"halting": {"drift_threshold": 1j}}, "halting.drift_threshold"),
        ({"halting": {"drift_threshold": np.float32("nan")}}, "halting.drift_threshold"),
        ({"halting": {"drift_threshold": np.array([0.1])}}, "halting.drift_threshold"),
        ({"halting": {"drift_threshold": np.bool_(True)}}, "halting.drift_threshold"),
        ({"halting": {**HALTING, "sink_tokens": 2**31}}, "halting.sink_tokens must be .* from 0 to 2147483647"),
        ({"halting": {**HALTING, "sink_tokens": 10**400}}, "halting.sink_tokens must be .* from 0 to 2147483647"),
        ({"halting": {**HALTING, "sink_tokens": np.float64(3)}}, "halting.sink_tokens must be a whole number"),
        ({"halting": {**HALTING, "sink_tokens": np.uint64(2**63)}}, "halting.sink_tokens"),
        ({"halting": {**HALTING, "min_layer": True}}, "halting.min_layer"),
        ({"halting": {**HALTING, "min_layer": None}}, "halting.min_layer"),
        ({"halting": {**HALTING, "min_layer": torch.tensor([1, 2])}}, "halting.min_layer"),
        ({"halting": {**HALTING, "resume_layer": 2**31}}, "halting.resume_layer"),
        ({"halting": {**HALTING, "kv_policy": ["skip"]}}, "halting.kv_policy"),
        ({"halting": {**HALTING, "kv_policy": None}}, "halting.kv_policy"),
        ({"halting": {**HALTING, 5: 1}}, "halting.5 is unknown"),
        ({"halting": FusionConfig(1, 0.5)}, "halting must be null or an object"),
        ({"halting": "x" * 10_000}, "halting must be null or an object"),
        ({"fusion": {"layer": 1}}, "fusion.threshold is missing"),
        ({"fusion": {**FUSION, "max_group": 2**31}}, "fusion.max_group must be .* from 2 to 2147483647"),
        ({"amq": {**AMQ, "layer": -(2**70)}}, "amq.layer must be .* from 0 to 2147483647"),
        ({"trace": None}, "trace must be true or false"),
        ({"trace": [[[]]]}, "trace must be true or false"),
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
    with pytest.raises(ValueError, match=names) as caught:
        QuickSilverConfig.from_dict(values)
    assert len(str(caught.value)) < 300


def test_scalars_of_numpy_and_of_tensors_are_numbers() -> None:
    want = QuickSilverConfig(HaltingConfig(0.5, min_layer=3, sink_tokens=0), FusionConfig(2, 1.0), trace=True)
    for integer, number, flag in (
        (np.int64, np.float32, np.bool_),
        (np.uint8, np.float64, lambda value: np.array(value)),
        (lambda value: np.array(value), np.float16, lambda value: torch.tensor(value)),
        (lambda value: torch.tensor(value), lambda value: torch.tensor(value), bool),
    ):
        halting = HaltingConfig(number(0.5), min_layer=integer(3), sink_tokens=integer(0))
        config = QuickSilverConfig(halting, FusionConfig(integer(2), integer(1)), trace=flag(True))
        assert config == want
        assert json.loads(json.dumps(config.to_dict())) == want.to_dict()
    assert type(HaltingConfig(1).drift_threshold) is float


def test_thresholds_may_be_as_large_as_floats_go() -> None:
    """Beyond the kernels' own floats, and so never reached, like infinity."""
    model = QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2, precision="adaptive")
    ids = torch.arange(20, 50, dtype=torch.int64, device="cpu")[None]
    for name in ("halting.drift_threshold", "halting.entropy_threshold", "fusion.threshold", "amq.entropy_threshold"):
        mechanism, field = name.split(".")
        first = {"halting": {**HALTING, "min_layer": 2}, "fusion": FUSION, "amq": AMQ}[mechanism]
        runs = []
        for value in (1e30, 1e39, 1e300, 10**300, float("inf")):
            config = QuickSilverConfig.from_dict({mechanism: {**first, field: value}})
            output = model.generate(ids, max_new_tokens=3, quicksilver_config=config)
            runs.append((output.sequences.tolist(), output.stats.layers_run, output.stats.bits_histogram))
        assert all(run == runs[0] for run in runs), name


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


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"halting": {"drift_threshold": 0.1}} x', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"trace": ' + 5000 * b"9" + b"}", "not valid JSON"),
        (b'{"trace": "\xff"}', "not UTF-8 text .from byte 11 on"),
        (b"\xff\xfe{\0}\0", "not UTF-8 text"),
        (b"[]", "must be an object"),
        (b"null", "must be an object"),
        (b'"x"', "must be an object"),
        (b'{"halting": {"drift_threshold": NaN}}', "halting.drift_threshold must be"),
        (b'{"halting": {"drift_threshold": 0.1, "sink_tokens": 2147483648}}', "halting.sink_tokens must be"),
        (b'{"halting": {"drift_treshold": 0.1}}', "halting.drift_treshold is unknown"),
        (None, "quicksilver_config.json in"),
    ],
)
def test_damaged_files_are_named(contents: bytes | None, message: str, tmp_path) -> None:
    file = tmp_path / "quicksilver_config.json"
    if contents is None:
        file.mkdir()
    else:
        file.write_bytes(contents)
    for source in (tmp_path, file):
        with pytest.raises(ValueError, match=message) as caught:
            QuickSilverConfig.from_pretrained(source)
        assert str(file) in str(caught.value) or contents is None


def test_sources_that_are_no_path() -> None:
    for source in ("x" * 5000, "a\0b"):
        with pytest.raises(ValueError) as caught:
            QuickSilverConfig.from_pretrained(source)
        assert len(str(caught.value)) < 300


def test_damaged_tensors_are_named(tmp_path) -> None:
    QuickSilverConfig(tensors={"a": torch.ones(3, dtype=torch.float32, device="cpu")}).save_pretrained(tmp_path)
    file = tmp_path / "quicksilver_config.safetensors"
    whole = file.read_bytes()
    for damage in (b"", whole[:-1], whole[:20], b"\xff" * 100):
        file.write_bytes(damage)
        with pytest.raises(ValueError, match=r"quicksilver_config\.safetensors can't be read"):
            QuickSilverConfig.from_pretrained(tmp_path)
    for tensors in (None, [1], {"a": 1}):
        with pytest.raises(ValueError, match="tensors must be a dict"):
            QuickSilverConfig(tensors=tensors)  # type: ignore[arg-type]


def test_saving_leaves_nothing_of_what_was_there(tmp_path) -> None:
    QuickSilverConfig(tensors={"a": torch.ones(3, dtype=torch.float32, device="cpu")}).save_pretrained(tmp_path)
    QuickSilverConfig().save_pretrained(tmp_path)
    assert QuickSilverConfig.from_pretrained(tmp_path).tensors == {}
    assert [path.name for path in tmp_path.iterdir()] == ["quicksilver_config.json"]


def test_group_sizes() -> None:
    for size in (0, 1, -64, 64.0, True, "64", 2**40):
        with pytest.raises(ValueError, match=r"group_size: got .* wanted one of 32, 64, 128"):
            QuickSilverForCausalLM.from_pretrained("/none", group_size=size)  # type: ignore[arg-type]


def test_what_a_model_cannot_run() -> None:
    with pytest.raises(ValueError, match=r"fusion\.layer is 12"):
        QuickSilverConfig.preset("paper").check_model(5, 64)
    translated = QuickSilverConfig(HaltingConfig(0.1, state="translated", min_layer=2))
    with pytest.raises(ValueError, match=r"translator\.2\.weight"):
        translated.check_model(4, 8)
    wrong = {"translator.2.weight": torch.zeros(8, 7), "translator.2.bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"must have shape \[8, 8\]"):
        QuickSilverConfig(HaltingConfig(0.1, state="translated", min_layer=2), tensors=wrong).check_model(3, 8)
    wrong = {"translator.2.weight": torch.zeros(8, 8).int(), "translator.2.bias": torch.zeros(8)}
    with pytest.raises(ValueError, match=r"translator\.2\.weight must hold floating-point numbers"):
        QuickSilverConfig(HaltingConfig(0.1, state="translated", min_layer=2), tensors=wrong).check_model(3, 8)
    with pytest.raises(ValueError, match=r"probe\.1\.weight"):
        QuickSilverConfig(amq=AMQConfig(1, 0.5, "probe")).check_model(4, 8)
