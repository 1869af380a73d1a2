"""Errors are short, on stderr, with a way out and the right exit status; Ctrl-C is no error."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lmopt
from lmopt.cli import backends as backends_verb

LMOPT = [sys.executable, "-c", "from lmopt.cli import main; main()"]


def test_an_unknown_backend_names_the_near_one(call, tiny) -> None:
    result = call("run", tiny, "w5", "--backend", "onnxruntim")
    assert result.status == 2
    assert "Did you mean 'onnxruntime'?" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_an_error_as_json(call, tmp_path: Path) -> None:
    result = call("run", tmp_path / "no-model", "w5", "--json")
    assert result.status == 2
    assert result.data["ok"] is False
    assert result.data["error"]["type"] == "ArtifactNotFoundError"
    assert "no-model" in result.data["error"]["message"]


def test_debug_shows_the_traceback(call, tmp_path: Path) -> None:
    result = call("run", tmp_path / "no-model", "w5", "--debug")
    assert result.status == 2
    assert "Traceback" in result.stderr


def test_pip_lines_keep_their_brackets(call, tiny, monkeypatch) -> None:
    from lmopt.registry import backends
    from lmopt.spec import BackendSpec, Capabilities, Requirement

    needs = Requirement("lmopt_no_such_module", "lmopt[tensorrt]")
    spec = BackendSpec("absent", "nowhere:engine", Capabilities(("module",)), (needs,))
    backends.register(spec)
    try:
        result = call("run", tiny, "w5", "--backend", "absent")
    finally:
        backends.unregister("absent")
    assert result.status == 2
    assert f'{sys.executable} -m pip install "lmopt[tensorrt]"' in result.stderr


@pytest.mark.parametrize(
    "words",
    [["run"], ["run", "x", "y", "--no-such-option"], ["no-such-verb"], ["bench", "x", "--rounds", "0"], []],
)
def test_wrong_usage_is_status_2(call, words) -> None:
    assert call(*words).status == 2


def test_a_tampered_artefact_is_named(call, exported, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(exported, copy)
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[100] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    result = call("run", copy, "w5")
    assert result.status == 2
    assert "CorruptArtifactError" in result.stderr
    assert "model.onnx.data" in result.stderr


def test_a_defect_is_neither_a_failed_check_nor_bad_usage(call, monkeypatch) -> None:
    def broken():
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(backends_verb.backends, "status", broken)
    result = call("backends", "--json")
    assert result.status == 70
    assert result.data["error"] == {"type": "RuntimeError", "message": "a bug of ours"}
    assert "Traceback" in result.stderr


def test_version(call) -> None:
    result = call("--version")
    assert (result.status, result.stdout) == (0, f"lmopt {lmopt.__version__}\n")


def test_every_verb_has_help_and_json(call) -> None:
    verbs = ("demo", "run", "chat", "export", "compare", "bench", "eval", "backends", "doctor")
    listed = call("--help").stdout
    for verb in verbs:
        assert verb in listed
        result = call(verb, "--help")
        assert result.status == 0
        assert "--json" in result.stdout
        assert "--debug" in result.stdout


def test_ctrl_c_ends_cleanly(exported) -> None:
    command = [*LMOPT, "chat", exported, "--max-new-tokens", "4", "--json"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A shell starts background jobs, and so perhaps this test, with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, **pipes, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        try:
            process.stdin.write("w5\n")
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["ok"]  # it has answered and waits for more
            process.send_signal(signal.SIGINT)
            for _ in range(300):
                if process.poll() is not None:
                    break
                time.sleep(0.1)
            assert process.returncode == 130
            words = process.stderr.read()
        finally:
            process.kill()
    assert "Traceback" not in words
    assert "interrupted" in words


def test_without_typer_the_pip_line_is_printed(tmp_path: Path) -> None:
    # `None` in sys.modules is how Python itself marks a module that cannot be imported.
    code = "import sys; sys.modules['typer'] = None; from lmopt.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert f'{sys.executable} -m pip install "lmopt[cli]"' in done.stderr
    assert "Traceback" not in done.stderr


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom lmopt.cli import main\nsys.argv = ['lmopt', '--help']\ntry:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "heavy = ('torch', 'onnx', 'onnxruntime', 'transformers', 'matplotlib')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_closed_pipe_is_no_defect(exported) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*LMOPT, "backends"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode not in (0, 70)
    assert "Traceback" not in done.stderr
