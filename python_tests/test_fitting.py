"""Weights that are fitted while they are packed: statistics of a short text, migrated scales, error compensation."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models import TRAINED_GPT2, VARIANTS, dense_logits, random_llama, random_model
from safetensors.torch import load_file, save_file

from quicksilver_ext import QuickSilverConfig, QuickSilverForCausalLM, quantize
from quicksilver_ext.architectures import dense, fitting
from quicksilver_ext.architectures.fitting import MATRICES, SAME_INPUT, Fitter, Inputs
from quicksilver_ext.architectures.loading import load_model
from quicksilver_ext.calibration import evaluation, optimize
from quicksilver_ext.cli.app import main
from quicksilver_ext.weights.matryoshka import empty
from quicksilver_ext.weights.model import Layer, Model

IDS = torch.randint(3, 1000, (2, 40), generator=torch.Generator().manual_seed(5))


def rotary_of(model: Model) -> tuple[torch.Tensor, torch.Tensor] | None:
    return None if model.rotary_cos is None else (model.rotary_cos, model.rotary_sin)


def run(model: Model, ids: torch.Tensor, layers: list[Layer] | None = None) -> torch.Tensor:
    hidden = dense.embed(model.embedding, model.position_embedding, ids)
    for index, layer in enumerate(layers or model.layers):
        hidden = dense.run_layer(model.spec, index, layer, hidden, rotary_of(model))
    return F.linear(dense.normalize(hidden, model.final_norm), model.head.weight)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_plain_layers_are_the_model(variant):
    model = load_model(random_model(variant, 3), "fp32")
    got = run(model, IDS)
    for text, logits in zip(IDS, got):
        assert (logits - dense_logits(model, text)).norm() < 1e-5 * logits.norm()


@pytest.mark.parametrize("variant", ["gpt2", "gpt2-relu", "llama", "qwen2", "qwen3"])
def test_a_migrated_layer_computes_the_same(variant):
    """With outliers of a norm, so that there is something to migrate."""
    model = load_model(random_model(variant, 3), "fp32")
    layer, hidden = model.layers[1], torch.randn(2, 30, model.spec.hidden_size)
    for norm in (layer.attention_norm, layer.mlp_norm):
        norm.weight[7] *= 100
    inputs = Inputs()
    want = dense.run_layer(model.spec, 1, layer, hidden, rotary_of(model), inputs)
    migrated, by = fitting.migrate(model.spec, layer, inputs)
    assert all((factors.log2() == factors.log2().round()).all() for factors in by.values())
    assert by["q"][7] >= 4 and by["up"][7] >= 4  # about the root of how far it stands out
    after = Inputs()
    got = dense.run_layer(model.spec, 1, migrated, hidden, rotary_of(model), after)
    assert (got - want).norm() < 1e-5 * want.norm()
    assert after.largest["q"][7] < inputs.largest["q"][7] / 3
    # What an input's channels were divided by is what its statistics say.
    for name, factors in by.items():
        torch.testing.assert_close(after.largest[name], inputs.largest[name] / factors, rtol=1e-4, atol=1e-6)


def test_importance_is_the_mean_square_rounded_and_rows_that_stand_out_are_held_down():
    x = torch.randn(1, 200, 64) * torch.logspace(-1, 1, 64)
    inputs = Inputs()
    inputs.add("o", x)
    squares = x.square().mean((0, 1))
    importance = inputs.importance("o")
    assert ((importance / (squares / squares.mean())).log2().abs() < 0.15).all()
    assert ((importance.log2() * 4 - (importance.log2() * 4).round()).abs() < 1e-4).all()
    x[0, 0, 3] = 1e4  # one row of 200: its square would be all of this channel's
    held = Inputs()
    held.add("o", x)
    assert held.importance("o")[3] < 2  # where 64 would be all


def packed_loss(lm: QuickSilverForCausalLM, text: str) -> float:
    return evaluation.evaluate(lm, text, window=128, max_tokens=3000).perplexity


def outliers(folder: Path, target: Path) -> Path:
    """A trained model that computes the same with some channels of its norms large, as large models have them."""
    target.mkdir()
    for file in folder.iterdir():
        if file.name != "model.safetensors" and file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    for name in tensors:
        for norm, matrix in (("ln_1", "attn.c_attn"), ("ln_2", "mlp.c_fc")):
            if f".{norm}.weight" in name:
                layer = name.split(f"{norm}.")[0]
                tensors[f"{layer}{matrix}.weight"][::13] /= 30
                for part in ("weight", "bias"):
                    tensors[f"{layer}{norm}.{part}"][::13] *= 30
    save_file(tensors, target / "model.safetensors")
    return target


def test_statistics_bring_packed_weights_nearer(tmp_path):
    """By perplexity over fp32, on text that the samples have nothing of."""
    text = evaluation.read_text("builtin:pydoc")[200_000:230_000]
    for source in (outliers(TRAINED_GPT2, tmp_path / "outliers"),):
        base = packed_loss(QuickSilverForCausalLM.from_pretrained(source, precision="fp32"), text)
        loss = {
            (precision, statistics): packed_loss(
                QuickSilverForCausalLM.from_pretrained(source, precision=precision, statistics=statistics), text
            )
            / base
            - 1
            for precision in ("int4", "int8")
            for statistics in (False, True)
        }
        assert loss["int8", True] < 0.01, loss
        assert loss["int4", True] < loss["int4", False], loss
    assert loss["int8", True] < 0.5 * loss["int8", False], loss


def test_the_same_file_gives_the_same_bits():
    first, second = (load_model(TRAINED_GPT2, "int8") for _ in range(2))
    plain = load_model(TRAINED_GPT2, "int8", statistics=False)
    for a, b, c in zip(first.layers, second.layers, plain.layers):
        for x, y in zip(a.linears(), b.linears()):
            for part in ("hi", "lo", "scale", "offset"):
                assert torch.equal(getattr(x.weight, part), getattr(y.weight, part))
        assert not torch.equal(a.up.weight.hi, c.up.weight.hi)


def test_models_whose_numbers_overflow_are_packed_without(tmp_path):
    folder = random_llama(4)
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "layernorm" in name:
            tensors[name] = tensors[name] * 1e30
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    fitted, plain = load_model(tmp_path), load_model(tmp_path, statistics=False)
    assert torch.equal(fitted.layers[1].up.weight.hi, plain.layers[1].up.weight.hi)


def test_a_matrix_that_cannot_be_packed_is_named(tmp_path):
    folder = random_llama(4)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] *= 1e-8
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    for statistics in (False, True):
        with pytest.raises(ValueError, match=r"up.*too small for the fp16 scales"):
            load_model(tmp_path, statistics=statistics)


# --- optimize ---------------------------------------------------------------------------------------------------------

SETTINGS = optimize.Settings(texts=24, length=64)
TEXT = evaluation.read_text("builtin:pydoc")


def correlated(columns: int, g: torch.Generator) -> torch.Tensor:
    """Rows [1000, columns] whose columns go together."""
    return torch.randn(1000, columns, generator=g) @ torch.randn(columns, columns, generator=g) * 0.1


@pytest.mark.parametrize(("columns", "size"), [(64, 64), (200, 64), (96, 32), (130, 128)])
def test_compensation_lowers_the_error_of_the_product(columns, size):
    g = torch.Generator().manual_seed(1)
    weight, x = torch.randn(40, columns, generator=g) * 0.05, correlated(columns, g)
    importance = x.square().mean(0)
    plain = quantize.pack_matryoshka(weight, size, importance=importance)
    out = empty(40, columns, size)
    optimize.compensate(weight, importance, x.T @ x, out, "up")
    want = x @ weight.T
    for bits in (4, 8):
        error = [(x @ each.dequantize(bits).T - want).norm() / want.norm() for each in (plain, out)]
        assert error[1] < 0.85 * error[0], (bits, error)


@pytest.mark.parametrize("columns", [150, 192])
def test_a_second_look_never_makes_the_product_worse(columns, monkeypatch):
    g = torch.Generator().manual_seed(3)
    weight, x = torch.randn(40, columns, generator=g) * 0.05, correlated(columns, g)
    errors = []
    for looks in (0, 1, 3):
        monkeypatch.setattr(optimize, "SECOND_LOOKS", looks)
        out = empty(40, columns, 64)
        optimize.compensate(weight, x.square().mean(0), x.T @ x, out, "up")
        errors.append([(x @ (out.dequantize(bits) - weight).T).norm(dim=0) for bits in (4, 8)])
    for before, after in pairwise(errors):
        # Of the damped product it's exact, row by row; damping is 3% of a mean column.
        assert all((a < 1.05 * b).all() and a.norm() < b.norm() for b, a in zip(before, after))


def test_columns_are_taken_by_the_size_of_their_inputs_and_groups_stay_together():
    large = torch.arange(150, dtype=torch.float32)
    order = optimize.order_of(torch.diag(large), 64).tolist()
    assert order == [*range(127, 63, -1), *range(63, -1, -1), *range(149, 127, -1)]


def test_without_correlations_there_is_nothing_to_make_up_for():
    weight = torch.randn(24, 128, generator=torch.Generator().manual_seed(2))
    out = empty(24, 128, 64)
    optimize.compensate(weight, torch.ones(128), torch.eye(128), out, "up")
    plain = quantize.pack_matryoshka(weight, importance=torch.ones(128))
    differ = (out.dequantize(4) != plain.dequantize(4)).float().mean()
    assert differ < 1e-3  # but for ties
    assert (out.dequantize(8) - plain.dequantize(8)).abs().max() < 1e-2


def test_optimized_weights_are_better_and_mix(tmp_path):
    text = TEXT[:150_000]
    values = quantize.optimize(TRAINED_GPT2, text, tmp_path, settings=SETTINGS)
    assert {"perplexity_before", "perplexity_int8", "perplexity_int4", "seconds", "provenance"} <= values.keys()
    report = json.loads((tmp_path / optimize.REPORT).read_text())
    assert report == json.loads(json.dumps(values)) and not (tmp_path / optimize.UNFINISHED).exists()

    # By KL divergence from fp32, on other text: of a small model perplexity alone says little.
    def log_probabilities(lm: QuickSilverForCausalLM) -> torch.Tensor:
        ids = torch.tensor(lm.tokenizer(TEXT[200_000:210_000], verbose=False)["input_ids"])
        return lm(ids[: len(ids) // 240 * 240].view(-1, 240)).logits.log_softmax(-1)

    base = log_probabilities(QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2, precision="fp32"))

    def away(lm: QuickSilverForCausalLM) -> float:
        return F.kl_div(log_probabilities(lm), base, reduction="sum", log_target=True).item()

    fitted, before = (
        [away(QuickSilverForCausalLM.from_pretrained(path, precision=precision)) for precision in ("int4", "int8")]
        for path in (tmp_path, TRAINED_GPT2)
    )
    assert fitted[0] < 0.7 * before[0] and fitted[1] < before[1], (fitted, before)
    # A mixture of both views costs no more than the worse of them.
    lm = QuickSilverForCausalLM.from_pretrained(tmp_path, precision="adaptive")
    mixed = lm.with_config(QuickSilverConfig.from_dict({"amq": {"layer": 2, "entropy_threshold": 0.5}}))
    assert away(mixed) < 1.05 * fitted[0]


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    fitted: list[int] = []
    keep = optimize.Compensated._keep

    def counted(self, index, out):
        fitted.append(index)
        return keep(self, index, out)

    monkeypatch.setattr(optimize.Compensated, "_keep", counted)
    settings = SETTINGS

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize.optimize(TRAINED_GPT2, TEXT[:60_000], tmp_path / "a", settings=settings, progress=stop)
    quantize.optimize(TRAINED_GPT2, TEXT[:60_000], tmp_path / "a", settings=settings)
    assert fitted == [0, 1, 2, 3, 4, 5]
    quantize.optimize(TRAINED_GPT2, TEXT[:60_000], tmp_path / "b", settings=settings)
    one, other = (load_model(tmp_path / name) for name in "ab")
    for a, b in zip(one.layers, other.layers):
        for x, y in zip(a.linears(), b.linears()):
            assert torch.equal(x.weight.hi, y.weight.hi) and torch.equal(x.weight.lo, y.weight.lo)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"group_size": 48}, "group_size: got 48"),
        ({"texts": "short"}, r"texts: got \d+ tokens, wanted at least"),
        ({"source": "nowhere/at/all"}, "nowhere/at/all: no such file"),
    ],
)
def test_bad_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        quantize.optimize(**{"source": TRAINED_GPT2, "texts": TEXT[:60_000], "output": tmp_path / "x", **arguments})
    assert not (tmp_path / "x").exists()


def test_bad_settings_are_named():
    for name, value in (("texts", 2), ("length", 4.0), ("length", 7), ("seed", True), ("seed", -1)):
        with pytest.raises(ValueError, match=f"{name}: got"):
            optimize.Settings(**{name: value})


def test_packed_folders_are_no_source(tmp_path):
    QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is packed already; wanted the model that it was made from"):
        quantize.optimize(tmp_path, TEXT[:60_000], tmp_path / "x")


def test_the_command(tmp_path, capsys):
    (tmp_path / "text.txt").write_text(TEXT[:60_000])
    arguments = ["optimize", "--model", str(TRAINED_GPT2), "--text", str(tmp_path / "text.txt"), "--output"]
    few = ["--texts", "9", "--length", "32"]
    assert main([*arguments, str(tmp_path / "out"), *few, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["perplexity_int8"] < 1.05 * values["perplexity_before"]
    assert values["provenance"]["settings"] == {"texts": 9, "length": 32, "seed": 0}
    assert main(["generate", "--model", str(tmp_path / "out"), "--prompt", "The", "--max-new-tokens", "3"]) == 0
    assert main([*arguments, str(tmp_path / "other"), "--group-size", "48"]) == 2


def test_every_matrix_has_an_input():
    assert set(SAME_INPUT) == set(MATRICES)
    assert issubclass(optimize.Compensated, Fitter)
