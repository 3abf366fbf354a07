# SPDX-License-Identifier: Apache-2.0
"""The command line: results on stdout, one-line errors on stderr, statuses that mean something."""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import (
    LAYER,
    child_environment,
    edit_config,
    edit_weights,
    make_dense,
    run_python,
    snapshot,
)

from sparse_unified.cli import build_parser, main

COUNTS = ["--num-experts", "4", "--top-k", "2"]
PIPE = subprocess.PIPE
PIPED: Any = {"env": child_environment(), "stdout": PIPE, "stderr": PIPE, "text": True}
COMMON = {"--help", "--json", "--quiet", "--traceback"}
# {command: {flag: default, or [default, choices...]}}: what users may rely on.
FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())


def assert_one_line(stderr: str, *words: str) -> None:
    assert stderr.startswith("sparse-unified: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    for word in words:
        assert word in stderr, stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    dense = make_dense(root / "dense")
    assert main(["convert", str(dense), str(root / "sparse"), *COUNTS]) == 0
    return dense, root / "sparse"


# Options


def flags_of(parser: argparse.ArgumentParser, name: str = "") -> dict[str, Any]:
    parser.fill()  # type: ignore[attr-defined]
    found: dict[str, Any] = {}
    own: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner, command in action.choices.items():
                found |= flags_of(command, f"{name} {inner}".strip())
        elif action.option_strings:
            default = list(action.default) if isinstance(action.default, tuple) else action.default
            choices = [] if action.choices is None else list(map(str, action.choices))
            flag = next(text for text in action.option_strings if text.startswith("--"))
            own[flag] = [default, *choices] if choices else default
            assert action.help, action
    return found or {name: own}


def test_flags_and_defaults_are_what_they_were() -> None:
    found = flags_of(build_parser())
    assert found.pop("bench") == {}
    for name, own in found.items():
        assert own.keys() >= COMMON, name
        assert {k: v for k, v in own.items() if k not in COMMON} == FLAGS[name]
    assert found.keys() == FLAGS.keys()
    text = build_parser().format_help()
    assert all(name.split()[0] in text for name in FLAGS)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("", "a command must be given"),
        ("info --memory", "--memory must come with DIR"),
        ("convert a b --num-experts 4 --top-k two", "--top-k: must be a positive integer"),
        ("convert a b --num-experts 4 --top-k 2 --num-exp 3", "--num-exp"),
        ("convert a b --num-experts 4 --top-k 2 --seed 1 --scores f", "--scores"),
        ("convert a b --num-experts 4 --top-k 2 --router-init activation", "--stats must"),
        ("prune m o --component und --axis depth", "--skip-layers must be given"),
        ("prune m o --component und --keep-ratio 2", "above 0 and at most 1"),
        ("prune m o --component und --keep-ratio .5 --seed 1", "--criterion random"),
        ("prune m o --component und --axis depth --skip-layers 1 --layers 1", "--layers must be"),
        *(
            (f"prune m o --component gen {wrong}", words)
            for wrong, words in [
                ("--component gen,gen", "--component: must be different ones of und, gen"),
                ("", "--keep-ratio must be given with --axis width"),
                ("--axis height", "--axis: must be different ones of depth"),
                ("--keep-ratio nan", "--keep-ratio: must be above 0"),
                ("--keep-ratio .5 --skip-layers 1", "--skip-layers must be given with an --axis"),
                ("--keep-ratio .5 --scores x --criterion random", "not allowed with argument"),
            ]
        ),
        ("generate m --out x.png", "--prompt or --prompts-file"),
        ("generate m --out x.tiff --prompt a", "ends in .png"),
        ("chat m --prompt ''", "a prompt that is not empty"),
        *(
            (f"generate m --out x.png --prompt a {wrong}", words)
            for wrong, words in [
                ("--size 100x64", "multiple of 16"),
                ("--cfg-interval nan,1", "LO,HI"),
                ("--storage und=int8,und=fp8", "--storage: must be int8, fp8, fp8-compute, nvfp4"),
                ("--device-map cpu", "--device-map: must be auto or MODULE=DEVICE"),
                ("--max-memory cpu=1GiB", "--max-memory must come with --device-map"),
                ("--max-memory cpu=much", "--max-memory: must be DEVICE=SIZE"),
                ("--device-map auto --offload und", "device_map must come without offload"),
                ("--task image --think", "--task must be all with --think"),
            ]
        ),
        *(
            (f"analyze m --out o --no-plots --task generation {wrong}", words)
            for wrong, words in [
                ("--ratios 1.5", "above 0 and at most 1"),
                ("--axis length", "depth, width, heads"),
                ("--images x", "--images must come with --prompts for generation"),
                ("--prompts a --prompts b", "--prompts must be given once for generation"),
                ("--geneval-scorer a:b", "--geneval-scorer must come with --geneval"),
            ]
        ),
        ("calibrate m --task editing --out o --criterion wanda", "--criterion must come with"),
        ("expert-usage m --task editing --plot x.pdf", "--plot must end in .png"),
        ("adapt m o --steps 1", "--data must be given"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(line: str, words: str, capsys: Any) -> None:
    assert main([word.strip("'") for word in line.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, words)


# Starting, and what comes out


def test_a_process_prints_its_result_and_nothing_else(pair: tuple[Path, Path]) -> None:
    dense, sparse = pair
    done = run_python("-m", "sparse_unified.cli", "verify", sparse, "--against", dense, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"] is True


def test_json_goes_to_stdout_or_to_a_file(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = str(pair[1])
    for given in (["--json", sparse], [sparse, "--json"], [sparse, "--json", "-"]):
        assert main(["info", *given]) == 0
        assert json.loads(capsys.readouterr().out)["top_k"] == 2
    path = tmp_path / "x.json"
    assert main(["info", sparse, "--json", str(path)]) == 0
    assert "nothing disagrees" in capsys.readouterr().out
    assert json.loads(path.read_text())["top_k"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]
    assert main(["info", sparse, "--json", str(tmp_path / "no" / "x.json")]) == 1
    assert_one_line(capsys.readouterr().err, "--json: directory must be there")


def test_a_check_that_fails_is_status_1_with_its_report_on_stdout(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "sparse"
    shutil.copytree(pair[1], directory)
    edit_weights(directory, lambda w: w[LAYER + "experts.3.up_proj.weight"][5].fill_(0))
    assert main(["verify", str(directory), "--against", str(pair[0])]) == 1
    captured = capsys.readouterr()
    assert "got 1 others: experts.3.neuron 5" in captured.out
    edit_config(directory, top_k=3)
    assert main(["info", str(directory)]) == 1
    captured = capsys.readouterr()
    assert "disagrees: llm_config.json: top_k must be" in captured.out
    assert captured.err == ""


def test_bad_data_is_one_line_and_status_1(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, sparse = (str(path) for path in pair)
    out = str(tmp_path / "out")
    cut = tmp_path / "cut"
    shutil.copytree(pair[1], cut)
    data = (cut / "ema.safetensors").read_bytes()
    (cut / "ema.safetensors").write_bytes(data[:-7])
    cases = [
        (["convert", dense, out, *COUNTS, "--layers", "1-7"], "layers must lie in 0 to 3, got 4"),
        (["convert", dense, sparse, *COUNTS], "target must not exist"),
        (["verify", str(cut), "--against", dense], "truncated"),
        (["invert", dense, out], "partition.safetensors: file must be there"),
        (["chat", "/nowhere", "--prompt", "a"], "must be a directory or a hub id"),
    ]
    for command, words in cases:
        assert main(command) == 1, words
        assert_one_line(capsys.readouterr().err, words)
        assert not Path(out).exists()


# What goes wrong around a command


# What is written waits a minute before it is on the disk.
_WAITING = """
import os, sys, time
from sparse_unified import cli
os.fsync = lambda file: (print("here", flush=True), time.sleep(60))
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.slow
def test_an_interrupted_conversion_cleans_up(number: signal.Signals, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    child = subprocess.Popen(
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        args=[sys.executable, "-c", _WAITING, "convert", dense, tmp_path / "out", *COUNTS],
        **PIPED,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    assert len(list(tmp_path.iterdir())) == 2
    child.send_signal(number)
    _, stderr = child.communicate(timeout=30)
    assert child.returncode == 128 + number
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.mark.slow
def test_a_closed_pipe_is_no_traceback(pair: tuple[Path, Path]) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "sparse_unified.cli", "info", str(pair[1]), "--json"], **PIPED
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait(timeout=60) == 1


@pytest.mark.parametrize("stdout", ["closed", "full"])
def test_work_whose_result_cannot_be_printed_is_done(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: Any, capsys: Any, stdout: str
) -> None:
    report = tmp_path / "r.json"
    with Path("/dev/full").open("w") as full:
        monkeypatch.setattr(sys, "stdout", None if stdout == "closed" else full)
        command = ["convert", str(pair[0]), str(tmp_path / "o"), *COUNTS, "--json", str(report)]
        assert main(command) == 1
    assert_one_line(capsys.readouterr().err, "the command is done, but")
    assert snapshot(tmp_path / "o") == snapshot(pair[1])
    assert json.loads(report.read_text())["top_k"] == 2


def test_what_stdout_cannot_encode_is_escaped(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("\u00fc\U0001f600", os.fsdecode(b"\xff")):
        out, printed, file = tmp_path / name, io.BytesIO(), tmp_path / "r.json"
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding="ascii"))
        assert main(["convert", str(pair[0]), str(out), *COUNTS, "--json", str(file)]) == 0
        assert str(tmp_path) in printed.getvalue().decode()
        assert json.loads(file.read_text())["out"] == str(out)
        assert main(["info", str(out), "--json"]) == 0
        text = printed.getvalue().decode()
        assert json.loads(text[text.index("{") :])["directory"] == str(out)


def test_an_unexpected_error_is_one_line_too(monkeypatch: Any, capsys: Any) -> None:
    def fail(*args: object) -> None:
        raise KeyError("x\ny")

    monkeypatch.setattr("sparse_unified.cli.checkpoint.info", fail)
    assert main(["info", "x"]) == 1
    assert_one_line(capsys.readouterr().err, "internal error KeyError")
    assert main(["info", "x", "--traceback"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_bench_gets_its_arguments_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = pytest.importorskip("sparse_unified.bench")
    seen: list[list[str]] = []
    monkeypatch.setattr(bench, "main", lambda argv: seen.append(argv))
    assert main(["bench", "--device", "cpu", "--json", "x"]) == 0
    assert seen == [["--device", "cpu", "--json", "x"]]
