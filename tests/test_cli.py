# SPDX-License-Identifier: Apache-2.0
"""The command line: results on stdout, one-line errors on stderr, statuses that mean something."""

from __future__ import annotations

import json
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpoint_files import (
    GOLDEN,
    LAYER,
    child_environment,
    edit_config,
    edit_weights,
    make_dense,
    snapshot,
)
from safetensors.torch import save_file

from sparse_unified.cli import main

COUNTS = ["--num-experts", "4", "--top-k", "2"]


def run_cli(
    *arguments: object, prepare: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sparse_unified.cli", *map(str, arguments)],
        env=child_environment(),
        preexec_fn=prepare,
        capture_output=True,
        text=True,
        check=False,
    )


def assert_one_line(stderr: str, *words: str) -> None:
    assert stderr.startswith("sparse-unified: error: "), stderr
    assert stderr.count("\n") == 1, stderr
    assert "Traceback" not in stderr
    for word in words:
        assert word in stderr, stderr


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pair")
    dense = make_dense(root / "dense")
    assert main(["convert", str(dense), str(root / "sparse"), *COUNTS]) == 0
    return dense, root / "sparse"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse model that can run, made by the command line."""
    from sparse_unified.fixtures import write_checkpoint

    pytest.importorskip("tokenizers")
    root = tmp_path_factory.mktemp("model")
    dense = write_checkpoint(GOLDEN / "t2i_dense", root / "dense")
    assert main(["convert", str(dense), str(root / "sparse"), *COUNTS]) == 0
    return root / "sparse"


def test_the_whole_way_as_a_user_walks_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    dense, _ = pair
    out, back = tmp_path / "sparse", tmp_path / "back"
    done = run_cli("convert", dense, out, *COUNTS, "--num-shared-experts", 2, "--layers", "1-2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "sparse layers      1-2" in done.stdout
    done = run_cli("verify", out, "--against", dense, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"] is True
    done = run_cli("invert", out, back)
    assert (done.returncode, done.stderr) == (0, "")
    assert snapshot(back) == snapshot(dense)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("convert", "verify", "invert", "info", "generate", "chat"):
        with pytest.raises(SystemExit) as caught:
            main([command, "--help"])
        assert caught.value.code == 0
        assert "--json" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in ("convert", "verify", "invert", "info", "bench"))
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sparse-unified ")


def test_the_command_line_imports_nothing_slow_by_itself() -> None:
    # The package may load its library; the commands load neither transformers, PIL nor tqdm.
    code = (
        "import sys, sparse_unified; before = set(sys.modules); import sparse_unified.cli; "
        "print(sorted(m for m in set(sys.modules) - before if m.partition('.')[0] in "
        "('torch', 'numpy', 'transformers', 'PIL', 'tqdm', 'safetensors') "
        "or m.startswith('sparse_unified.') and '.cli' not in m and '._' not in m))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["a command must be given"]),
        (["frobnicate"], ["invalid choice: 'frobnicate'"]),
        (["info", "--memory"], ["--memory must come with DIR"]),
        (["info", "x", "--wrong"], ["unrecognized arguments: --wrong"]),
        (["convert", "a", "b", "--num-experts", "4", "--top-k", "two"], ["--top-k", "'two'"]),
        (["convert", "a", "b", "--num-experts", "4"], ["required: --top-k"]),
        (["convert", "a", "b", *COUNTS, "--num-exp", "3"], ["unrecognized arguments: --num-exp"]),
        (["convert", "a", "b", *COUNTS, "--component", "vit"], ["--component", "'vit'"]),
        (["convert", "a", "b", *COUNTS, "--seed", "1", "--scores", "f"], ["not allowed with"]),
        (["generate", "m", "--prompt", "a", "--seed", "-1"], ["--seed", "from 0 to 9223372"]),
        (["verify", "a"], ["required: --against"]),
        (["generate", "m", "--out", "x.png"], ["--prompt or --prompts-file", "got none"]),
        (["generate", "m", "--out", "x.png", "--prompt", " "], ["prompt must not be empty"]),
        (["chat", "m", "--prompt", ""], ["prompt must not be empty"]),
        (["generate", "m", "--out", "x.tiff", "--prompt", "a"], ["must end in .png"]),
        (["generate", "m", "--prompt", "a"], ["required: --out"]),
        *(
            (["generate", "m", "--out", "x.png", "--prompt", "a", *wrong], words)
            for wrong, words in [
                (["--size", "100x64"], ["multiple of 16", "'100'"]),
                (["--size", "0x64"], ["multiple of 16"]),
                (["--size", "-16x64"], ["--size"]),
                (["--size", "64"], ["HEIGHTxWIDTH"]),
                (["--height", "64"], ["--height and --width together"]),
                (["--height", "17", "--width", "64"], ["multiple of 16", "'17'"]),
                (["--steps", "0"], ["positive integer"]),
                (["--cfg-interval", "1"], ["two numbers"]),
                (["--cfg-interval", "1,0"], ["LO,HI"]),
                (["--cfg-interval", "nan,1"], ["LO,HI"]),
                (["--cfg-renorm-type", "none"], ["invalid choice: 'none'"]),
                (["--edit"], ["--edit must come with --image"]),
                (["--dtype", "int8"], ["invalid choice: 'int8'"]),
            ]
        ),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, *words)


def test_bad_arguments_of_convert_are_one_line_and_status_1(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, sparse = (str(path) for path in pair)
    out = str(tmp_path / "out")
    (tmp_path / "cut.safetensors").write_bytes(b"123")
    save_file({"x": torch.ones(3)}, tmp_path / "x.safetensors")
    cases = [
        (["--num-experts", "5", "--top-k", "2"], dense, "these counts do: 2, 3, 4, 6, 8"),
        (["--num-experts", "4", "--top-k", "5"], dense, "top_k must be 1 to num_experts = 4"),
        ([*COUNTS, "--layers", "1-7"], dense, "layers must lie in 0 to 3, got 4"),
        ([*COUNTS, "--layers", "x"], dense, "layers must be 'middle'"),
        ([*COUNTS, "--scores", str(tmp_path / "none")], dense, "file must be readable"),
        ([*COUNTS, "--scores", str(tmp_path / "cut.safetensors")], dense, "8 byte header"),
        ([*COUNTS, "--scores", str(tmp_path / "x.safetensors")], dense, "one tensor 'scores'"),
        (COUNTS, sparse, "must all be dense"),
        (COUNTS, str(tmp_path / "none"), "checkpoint must be a directory"),
        (COUNTS, str(tmp_path), "directory must hold ema.safetensors"),
    ]
    for options, source, words in cases:
        assert main(["convert", source, out, *options]) == 1, words
        assert_one_line(capsys.readouterr().err, words)
        assert not Path(out).exists()
    assert main(["convert", dense, sparse, *COUNTS]) == 1
    assert_one_line(capsys.readouterr().err, "target must not exist")
    assert main(["convert", dense, out, *COUNTS, "--json", str(tmp_path / "no/x.json")]) == 1
    assert_one_line(capsys.readouterr().err, "--json: directory must be there")
    assert not Path(out).exists()


def test_a_damaged_checkpoint_is_one_line_and_status_1(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(edit: Callable[[Path], object]) -> str:
        directory = tmp_path / "damaged"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(pair[1], directory)
        edit(directory)
        return str(directory)

    def cut(directory: Path) -> None:
        data = (directory / "ema.safetensors").read_bytes()
        (directory / "ema.safetensors").write_bytes(data[:-7])

    edits: list[tuple[Callable[[Path], object], str]] = [
        (cut, "truncated"),
        (lambda d: edit_config(d, top_k=3), "top_k must equal num_experts_per_tok"),
        (lambda d: edit_config(d, transformed_gen=[1]), "transformed_gen must be [1, 2]"),
        (lambda d: (d / "llm_config.json").write_text("{"), "file must be JSON"),
        (lambda d: edit_weights(d, lambda w: w.pop(LAYER + "gate.weight")), "got no gate.weight"),
    ]
    for edit, words in edits:
        directory = damaged(edit)
        for command in (
            ["verify", directory, "--against", str(pair[0])],
            ["invert", directory, str(tmp_path / "out")],
        ):
            assert main(command) == 1, words
            assert_one_line(capsys.readouterr().err, words)
    assert main(["info", damaged(cut)]) == 1
    assert_one_line(capsys.readouterr().err, "truncated")
    assert main(["invert", str(pair[0]), str(tmp_path / "out")]) == 1
    assert_one_line(capsys.readouterr().err, "partition.safetensors: file must be there")


def test_a_failed_verification_is_status_1_with_its_table_on_stdout(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "sparse"
    shutil.copytree(pair[1], directory)
    edit_weights(directory, lambda w: w[LAYER + "experts.3.up_proj.weight"][5].fill_(0))
    assert main(["verify", str(directory), "--against", str(pair[0])]) == 1
    captured = capsys.readouterr()
    assert "gen layer 1, expert 3, neuron 5: must be a dense neuron" in captured.out
    assert "IS NOT a reordering" in captured.out


def test_info_with_disagreements_is_status_1_with_its_report_on_stdout(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for directory in pair:
        assert main(["info", str(directory)]) == 0
        assert "nothing disagrees" in capsys.readouterr().out
    directory = tmp_path / "sparse"
    shutil.copytree(pair[1], directory)
    edit_config(directory, top_k=3)
    assert main(["info", str(directory)]) == 1
    captured = capsys.readouterr()
    assert "disagrees: llm_config.json: top_k must equal" in captured.out
    assert captured.err == ""
    assert main(["info", str(directory), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"]
    with pytest.raises(SystemExit):
        main(["info", "--help"])
    assert "Exit status 1 when anything disagrees" in " ".join(capsys.readouterr().out.split())


def test_json_goes_to_stdout_or_to_a_file(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = str(pair[1])
    for arguments in (["--json", sparse], [sparse, "--json"], [sparse, "--json", "-"]):
        assert main(["info", *arguments]) == 0
        assert json.loads(capsys.readouterr().out)["top_k"] == 2
    path = tmp_path / "x.json"
    assert main(["info", sparse, "--json", str(path)]) == 0
    assert "nothing disagrees" in capsys.readouterr().out
    assert json.loads(path.read_text())["top_k"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def limit_file_size() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    for command in (
        ["convert", pair[0], tmp_path / "out", *COUNTS],
        ["invert", pair[1], tmp_path / "out"],
    ):
        done = run_cli(*command, prepare=limit_file_size)
        assert done.returncode == 1
        assert_one_line(done.stderr, "must be accessible with room to spare", "File too large")
        assert list(tmp_path.iterdir()) == []


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that other users can enter, which those of pytest are not."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def test_a_target_or_source_without_permission_is_one_line(public: Path) -> None:
    dense = make_dense(public / "dense")
    for path in dense.rglob("*.safetensors"):
        path.chmod(0o644)
    closed = public / "closed"
    closed.mkdir(mode=0o555)
    # As root nothing is forbidden: become somebody else, who may look but not touch.
    code = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); "
        "import sparse_unified.cli, sparse_unified.checkpoint; "
        "os.geteuid() or (os.setgroups([]), os.setgid(65534), os.setuid(65534)); "
        "sys.exit(sparse_unified.cli.main(sys.argv[1:]))"
    )

    def run_restricted(*arguments: object) -> subprocess.CompletedProcess[str]:
        package = child_environment()["PYTHONPATH"]
        return subprocess.run(
            [sys.executable, "-c", code, package, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
        )

    done = run_restricted("convert", dense, closed / "out", *COUNTS)
    assert done.returncode == 1
    assert_one_line(done.stderr, "must be accessible", "Permission denied")
    assert list(closed.iterdir()) == []

    (dense / "ema.safetensors").chmod(0)
    done = run_restricted("info", dense)
    assert done.returncode == 1
    assert_one_line(done.stderr, "file must be readable, got Permission denied")

    dense.chmod(0)
    done = run_restricted("info", dense)
    assert done.returncode == 1
    assert_one_line(done.stderr, "checkpoint must be readable, got Permission denied")
    dense.chmod(0o755)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_conversion_cleans_up(number: signal.Signals, tmp_path: Path) -> None:
    dense = make_dense(tmp_path / "dense")
    # The last file waits a minute, with everything else written.
    code = (
        "import sys, time, sparse_unified.convert; from sparse_unified import cli; "
        "convert = sys.modules['sparse_unified.convert.convert']; "
        "convert.write_sidecar = lambda *a: (print('here', flush=True), time.sleep(60)); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    child = subprocess.Popen(
        # A shell's background jobs ignore SIGINT, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        args=[sys.executable, "-c", code, "convert", dense, tmp_path / "out", *COUNTS],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "here\n"
    assert len(list(tmp_path.iterdir())) == 2
    child.send_signal(number)
    _, stderr = child.communicate(timeout=30)
    assert child.returncode == 128 + number
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_closed_pipe_is_no_traceback(pair: tuple[Path, Path]) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "sparse_unified.cli", "info", str(pair[1]), "--json"],
        env=child_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    child.stdout.close()
    assert child.stderr is not None
    assert child.stderr.read() == ""
    child.stderr.close()
    assert child.wait(timeout=60) == 1


def test_an_unexpected_error_is_one_line_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object) -> None:
        raise KeyError("x\ny")

    monkeypatch.setattr("sparse_unified.checkpoint.info", fail)
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


def assert_same_picture(one: Path, other: Path) -> None:
    """Equal up to the rounding of a pixel: GEMMs of other sizes sum in another order."""
    image = pytest.importorskip("PIL.Image")
    pixels = (image.open(path).tobytes() for path in (one, other))
    assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 1


def test_generate_writes_a_picture_for_each_prompt(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "prompts.txt").write_text("\na cat\n  a dog \n\n")
    common = ["generate", str(model), "--steps", "3", "--seed", "5", "--quiet"]
    status = main(
        [
            *common,
            "--prompt",
            "a red bench",
            "--prompts-file",
            str(tmp_path / "prompts.txt"),
            "--size",
            "48x64",
            "--out",
            str(tmp_path / "x.png"),
            "--json",
            str(tmp_path / "r.json"),
        ]
    )
    assert status == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert [entry["prompt"] for entry in report["images"]] == ["a red bench", "a cat", "a dog"]
    assert [entry["seed"] for entry in report["images"]] == [5, 6, 7]
    for number in range(3):
        assert image.open(tmp_path / f"x-{number}.png").size == (64, 48)
    assert report["steps"] == len(report["step_seconds"]) == 2
    assert report["backend"] == "cpu"
    assert report["image_tokens"] == 3 * 3 * 4
    assert report["peak_memory_bytes"] > 0
    assert report["seconds_per_step"] > 0
    assert "2 steps of " in capsys.readouterr().out

    # One prompt alone gives the picture it gives among others; --height and --width are a size.
    single = [*common, "--prompt", "a red bench", "--height", "48", "--width", "64"]
    assert main([*single, "--out", str(tmp_path / "y.png"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"][0]["seed"] == 5
    assert_same_picture(tmp_path / "x-0.png", tmp_path / "y.png")


def test_a_bounded_batch_gives_the_same_pictures(model: Path, tmp_path: Path) -> None:
    common = ["generate", str(model), "--prompt", "red", "--prompt", "blue", "--size", "64x64"]
    common += ["--steps", "2", "--seed", "5", "--quiet", "--think", "--max-think-tokens", "3"]
    assert main([*common, "--out", str(tmp_path / "all.png")]) == 0
    assert main([*common, "--out", str(tmp_path / "one.png"), "--batch-size", "1"]) == 0
    for index in range(2):
        assert_same_picture(tmp_path / f"all-{index}.png", tmp_path / f"one-{index}.png")


def test_pictures_are_edited_and_talked_about(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = pytest.importorskip("PIL.Image")
    picture = str(tmp_path / "in.png")
    image.new("RGB", (64, 64), (200, 30, 30)).save(picture)
    command = ["generate", str(model), "--prompt", "blue", "--steps", "2", "--size", "64x64"]
    out = str(tmp_path / "x.png")
    assert main([*command, "--image", picture, "--edit", "--seed", "1", "--out", out]) == 0
    assert image.open(out).size == (64, 64)
    capsys.readouterr()
    assert main(["chat", str(model), "--prompt", "what?", "--image", picture, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["text_tokens"] == len(answer["token_ids"]) - 1

    (tmp_path / "text.png").write_text("no picture")
    for wrong, words in [
        (["--image", str(tmp_path / "text.png")], "must be a readable image"),
        (["--image", str(tmp_path / "none.png")], "must be a readable image"),
        (["--prompts-file", str(tmp_path / "none.txt")], "must be readable text"),
        (["--device", "toaster"], "must be a device of this torch"),
        (["--device", "meta"], "--device: name must be a device that holds data, got 'meta'"),
    ]:
        assert main([*command, "--out", out, *wrong]) == 1, wrong
        assert_one_line(capsys.readouterr().err, words)
    assert main([*command, "--out", str(tmp_path / "no" / "x.png")]) == 1
    assert_one_line(capsys.readouterr().err, "--out: directory must be there")
    assert (
        main(
            [
                *command,
                "--image",
                picture,
                "--image",
                picture,
                "--prompt",
                "b",
                "--prompt",
                "c",
                "--out",
                out,
            ]
        )
        == 2
    )
    assert_one_line(capsys.readouterr().err, "once or once for each of 3 prompts, got 2")


def test_a_model_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "/nowhere", "--prompt", "a"]) == 1
    assert_one_line(capsys.readouterr().err, "must be a directory or a hub id")
