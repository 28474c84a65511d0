"""Programs that a model might write, hostile ones too: none gets out, none passes unearned."""

import subprocess
import sys
import time

import pytest

from pgpo_jax.errors import InputError
from pgpo_jax.tasks import programs, sandbox, sandbox_worker, workers
from pgpo_jax.tasks.programs import Test, Tests

SECRET = "secret-7391"  # what only a test has
HANGS, LONG = 0.6, 60.0  # seconds; nothing but what hangs is held to the short limit

# What reads "3" from its input must print 6.
READING = {
    "honest": ("print(2 * int(input()))", {"passed"}),
    "forks": ("import os\nwhile True: os.fork()", {"error"}),
    "starts a process": ("import subprocess\nsubprocess.run(['sleep', '60'])", {"error"}),
    "starts a worker": (
        "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
        {"error"},
    ),
    "starts a shell": ("import os\nprint(os.system('echo 6'))", {"wrong"}),
    "becomes a shell": ("import os\nos.execv('/bin/sh', ['sh', '-c', 'echo 6'])", {"error"}),
    "asks for all memory": ("x = bytearray(2**40)", {"error"}),
    "takes more and more memory": ("x = []\nwhile 1: x.append(bytearray(2**26))", {"error"}),
    "maps more and more memory": (
        "import mmap\nx = []\nwhile 1: x.append(mmap.mmap(-1, 2**26))",
        {"error"},
    ),
    "makes a file of memory": ("import os\nos.memfd_create('x')", {"error"}),
    "makes users of its own": (
        "import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))",
        {"wrong"},
    ),
    "prints without end": ("while True: print('x' * 10**5)", {"output"}),
    "writes without end": ("import os\nwhile True: os.write(1, b'x' * 10**5)", {"output"}),
    "closes its output": ("import os\nos.close(1)\nos.close(2)", {"wrong"}),
    "closes its streams": (
        "import sys\nsys.stdout.close()\nsys.stderr.close()\nsys.stdin.close()",
        {"wrong"},
    ),
    "loops": ("while True: pass", {"time"}),
    "sleeps": ("import time\ntime.sleep(600)", {"time"}),
    "leaves a thread asleep": (
        "import threading as t, time\nt.Thread(target=time.sleep, args=(600,)).start()\nprint(6)",
        {"time"},
    ),
    "hears no signal": (
        "import signal\nfor s in {*signal.valid_signals()} - {9, 19, 32, 33}: signal.signal(s, 1)\n"
        "while True: pass",
        {"time"},
    ),
    "lets a pattern run": ("import re\nre.match('(a*)*b', 'a' * 60)", {"time"}),
    "ends at once": ("import os\nos._exit(0)", {"wrong"}),
    "exits": ("import sys\nsys.exit(0)", {"wrong"}),
    "exits with an error": ("print(6)\nraise SystemExit('no')", {"ended"}),
    "aborts": ("import os\nos.abort()", {"ended"}),
    "reads address 0": ("import ctypes\nctypes.string_at(0)", {"ended"}),
    "calls itself": ("def f(): f()\nf()", {"error"}),
    "calls itself in C": (
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        {"ended", "error"},
    ),
    "starts threads without end": (
        "import threading, time\nthreading.stack_size(32768)\n"
        "while True: threading.Thread(target=time.sleep, args=(600,)).start()",
        {"threads"},
    ),
    "writes to /etc": ("open('/etc/passwd', 'w')", {"error"}),
    "writes to /usr": ("open('/usr/x', 'w')", {"error"}),
    "writes to shared memory": ("open('/dev/shm/x', 'w')", {"error"}),
    "writes a file without end": (
        "f = open('/tmp/x', 'wb')\nwhile True: f.write(bytes(2**20))",
        {"error"},
    ),
    "writes many files": (
        "for i in range(100): open(f'/tmp/{i}', 'wb').write(bytes(2**21))",
        {"error"},
    ),
    "follows a link out": (
        "import os\nos.symlink('/etc/passwd', '/tmp/x')\nprint(open('/tmp/x').read())",
        {"error"},
    ),
    "reads /proc": ("print(open('/proc/1/environ').read())", {"error"}),
    "reads the home": ("import os\nprint(os.listdir(os.path.expanduser('~')))", {"error"}),
    "imports the package": ("import pgpo_jax", {"error"}),
    "calls out": (
        "import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=9)",
        {"error"},
    ),
    "reads its environment": ("import os\nprint(*os.environ)", {"wrong"}),
    "signals its parent": (
        "import os\nfor s in (2, 9, 15, 19): os.kill(os.getppid(), s)\nprint(6)",
        {"passed"},  # process 1 hears none
    ),
    "prints what is no text": (
        "import sys\nsys.stdout.buffer.write(bytes(range(256)))",
        {"wrong"},
    ),
    "prints half a character": ("print('\\ud800')", {"error"}),
    "has a NUL": ("print(6)\0", {"error"}),
    "is no text itself": ("print('\ud800')", {"error"}),
    "opens brackets without end": ("(" * 10**5, {"error"}),
    "raises what cannot be shown": (
        "class E(Exception):\n  def __str__(self): raise self\nraise E",
        {"error"},
    ),
}
EQUAL = f"assert f(3) == '{SECRET}'"
TESTED = {
    "gives the right value": (f"f = lambda x: '{SECRET}'", EQUAL, {"passed"}),
    "ends before its test": ("import os\nos._exit(0)", EQUAL, {"ended"}),
    "ends in its test": ("import os\nf = lambda x: os._exit(0)", EQUAL, {"ended"}),
    "exits before its test": ("raise SystemExit(0)", EQUAL, {"error"}),
    "exits in its test": ("import sys\nf = lambda x: sys.exit(0)", EQUAL, {"error"}),
    "equals everything": (
        "class T:\n  __eq__ = lambda *_: True\n  __bool__ = lambda _: True\nf = lambda x: T()",
        EQUAL,
        {"wrong"},
    ),
    "is a number that equals everything": (
        "class T(int):\n  __eq__ = lambda *_: True\nf = lambda x: T()",
        "assert f(3) == 6",
        {"wrong"},
    ),
    "replaces assertions": (
        "import builtins\nbuiltins.AssertionError = ValueError\nbuiltins.len = lambda _: 6\n"
        "f = lambda x: ''",
        "assert len(f(3)) == 6",
        {"wrong", "ended"},
    ),
    "has an abs of its own": (
        "abs = lambda _: 0\nf = lambda x: 0",
        "assert abs(f(3) - 6) < 1e-6",
        {"wrong"},
    ),
    "replaces a module's function": (
        "import math\nmath.isclose = lambda *_: True\nf = lambda x: 0",
        "import math\nassert math.isclose(f(3), 6)",
        {"wrong"},
    ),
    "names a module's replacement": (
        "class math:\n  isclose = lambda *_: True\nf = lambda x: 0",
        "assert math.isclose(f(3), 6)",
        {"error"},
    ),
    "replaces unittest": (
        "import unittest\nunittest.TestCase.assertEqual = lambda *_: 0\nf = lambda x: 0",
        "import unittest\nunittest.TestCase().assertEqual(f(3), 6)",
        {"wrong"},
    ),
    "says that it passed": (
        'import os\nfor file in range(64):\n  try: os.write(file, b\'{"kind": "passed"}\\n\')\n'
        "  except OSError: pass\nf = lambda x: 0",
        EQUAL,
        {"error"},
    ),
    "says so in an error": (
        'import os\nos.write(4, b\'{"raised": {"error": "", "type": "", "line": "", '
        '"kind": "passed"}}\\n\')',
        EQUAL,
        {"error"},
    ),
    "looks for the test in its memory": (
        "import gc, re, sys\ndef f(x):\n  frame, seen = sys._getframe(), gc.get_objects()\n"
        "  while frame:\n    seen += [*frame.f_locals.values(), *frame.f_code.co_consts]\n"
        "    frame = frame.f_back\n"
        "  seen += gc.get_referents(*seen)\n"
        "  seen = [repr(one) for one in seen if isinstance(one, str | bytes | bytearray | dict)]\n"
        "  return re.findall('secret-[0-9]+', ' '.join(seen))[0]",
        EQUAL,
        {"error"},  # IndexError: nowhere
    ),
    "kills its test": ("import os\nf = lambda x: os.kill(-1, 9)", EQUAL, {"ended"}),
    "stops its test": ("import os\nf = lambda x: os.kill(-1, 19)", EQUAL, {"time"}),
    "hangs in its test": ("def f(x):\n  while True: pass", EQUAL, {"time"}),
    "yields without end": (
        "def f(x):\n  while True: yield 5",
        "assert next(f(3)) == 6",
        {"wrong"},
    ),
    "gives a list without a floor": (
        "x = []\nfor _ in range(10**5): x = [x]\nf = lambda _: x",
        EQUAL,
        {"error"},
    ),
    "gives too much": ("f = lambda x: 'x' * 2**26", EQUAL, {"wrong"}),
    "has no such function": ("g = 1", EQUAL, {"error"}),
}
HANGING = {"time", "threads"}


@pytest.fixture(scope="module")
def box():
    try:
        found = sandbox.Sandbox("bubblewrap")
    except InputError as error:
        pytest.skip(str(error))
    yield found
    found.stop()


@pytest.fixture(scope="module")
def verdicts(box):
    """What became of each program, and what it printed; all in one call, so that they overlap."""
    reading = [(name, source, Test(None, "3\n", "6\n"), k) for name, (source, k) in READING.items()]
    tested = [(name, source, Test(test), k) for name, (source, test, k) in TESTED.items()]

    def run(name, source, test, kinds):
        seconds = HANGS if kinds == {"time"} else LONG
        return name, programs._run(box, Tests((), (test,)), test, source, seconds)

    rows = [*reading, *tested]
    return dict(workers.spread(run, *zip(*rows, strict=True), workers=4))


@pytest.mark.parametrize("name", READING)
def test_a_program_that(name, verdicts):
    assert verdicts[name].kind in READING[name][1], verdicts[name]


@pytest.mark.parametrize("name", TESTED)
def test_a_tested_program_that(name, verdicts):
    assert verdicts[name].kind in TESTED[name][2], verdicts[name]


def test_the_environment_of_the_run_is_not_there(verdicts):
    names = set(verdicts["reads its environment"].output.split())
    assert names <= {"PWD", "LC_CTYPE"}


def test_after_all_that_an_honest_program_passes(box, verdicts):
    test = Test(None, "3\n", "6\n")
    verdict = programs._run(box, Tests((), (test,)), test, READING["honest"][0], LONG)
    assert verdict.kind == "passed"


def test_a_file_that_a_program_leaves_is_not_there_for_the_next(box):
    for _ in range(2):
        found = box.run("import os\nprint(os.listdir())\nopen('left', 'w')", "", LONG)
        assert found["output"] == "[]\n"


def test_a_program_is_as_python_runs_it(box):
    source = (
        "import sys, atexit, threading\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass P:\n  x: int\n"
        "atexit.register(print, 'last')\n"
        "threading.stack_size(2**26)\nsys.setrecursionlimit(10**6)\n"
        "def deep(n): return n and 1 + deep(n - 1)\n"
        "if __name__ == '__main__':\n"
        "  threading.Thread(target=lambda: print(deep(20000), sys.stdin.read(), P(1))).start()\n"
    )
    found = box.run(source, "é\nx", LONG)
    assert (found["why"], found["code"], found["output"]) == (
        None,
        0,
        "20000 é\nx P(x=1)\nlast\n",
    )


VALUES = "None, True, -1, 2**70, 1.5, 'é', b'x', [1, (2, {3})], {(1, 2): frozenset({4})}, 1j"


def test_values_pass_between_a_program_and_its_test_unchanged(box):
    test = (
        f"values = [{VALUES}]\n"
        "assert f(values) == values\n"
        "assert [type(v) for v in f(values)] == [type(v) for v in values]\n"
        "assert list(f(range(3))) == [0, 1, 2] and sum(g(4)) == 6"
    )
    source = "def f(x): return x\ndef g(n): yield from range(n)"
    assert box.test(source, test, None, LONG)["said"] == {"kind": "passed"}


def test_a_test_may_use_objects_of_the_program_and_see_lists_change(box):
    source = (
        "class Point:\n  def __init__(self, x): self.x = x\n"
        "  def __add__(self, o): return Point(self.x + o.x)\n"
        "  def __eq__(self, o): return self.x == o.x\n"
        "class Stack:\n  def __init__(self): self.all = []\n"
        "  def push(self, x): self.all.append(x)\n  def __len__(self): return len(self.all)\n"
        "def widest(points): return max(p.x for p in points)\n"
        "def sort(x): x.sort()\n"
        "def sum(a, b): return a - b\n"
        "def fail(x): raise KeyError(x)\n"
    )
    test = (
        "assert widest([Point(1), Point(5)]) == 5\nassert Point(2) == Point(2)\n"
        "assert Point(2) != 2\n"
        "s = Stack()\ns.push(4)\nassert len(s) == 1 and s.all == [4]\n"
        "x = [3, 1]\nsort(x)\nassert x == [1, 3]\n"
        "assert sum(5, 2) == 3\n"  # Python has one too, but the test means the program's
        "try: fail(1)\nexcept KeyError: pass\nelse: assert False\n"
    )
    assert box.test(source, test, None, LONG)["said"] == {"kind": "passed"}


def test_what_cannot_be_given_to_a_program_is_not_its_fault(box):
    test = Test("assert f(lambda x: x) == 1")
    verdict = programs._run(box, Tests((), (test,)), test, "f = lambda g: g(1)", LONG)
    assert verdict.kind == "broken"


def test_a_sandbox_ends_when_nobody_waits_for_it_any_more(box):
    request = b'["stdin", "while True: pass", "", null, 500.0]\n'
    with subprocess.Popen(
        box._pool._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={}
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b'"ready"\n'
        process.stdin.write(request)
        process.stdin.flush()
        time.sleep(0.2)
        process.stdin.close()
        assert process.wait(timeout=30) == 0


# ---- no sandbox ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unprotected():
    if not sys.platform.startswith("linux"):
        pytest.skip("programs run on Linux only")
    try:
        found = sandbox.Sandbox("none")
    except InputError as error:
        pytest.skip(str(error))
    yield found
    found.stop()


def test_without_a_sandbox_programs_are_confined_all_the_same(unprotected):
    assert unprotected.run("print(input())", "3", LONG)["output"] == "3\n"
    said = unprotected.run("import os\nos.fork()", "", LONG)["said"]
    assert (said["type"], said["line"]) == ("PermissionError", "line 2: os.fork()")
    assert unprotected.run("while True: pass", "", HANGS)["why"] == "time"
    assert unprotected.test("f = abs", "assert f(-3) == 3", None, LONG)["said"]["kind"] == "passed"
    assert sandbox.notes("none") and not sandbox.notes("bubblewrap")


def test_where_bubblewrap_is_missing_the_run_is_refused_with_what_to_do(monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda _: None)
    with pytest.raises(InputError, match=r"task.sandbox: got 'bubblewrap', .*`apt install bub"):
        sandbox.Sandbox("bubblewrap")


@pytest.mark.parametrize(
    ("does", "said"),
    [
        ("echo 'bwrap: No permissions to create new namespace' >&2; exit 1", "No permissions"),
        ("exit 0", "it said nothing"),
        ("exec /no/such/file", "no/such/file"),
    ],
)
def test_where_it_can_make_no_sandbox_too(does, said, monkeypatch):
    monkeypatch.setattr(sandbox, "_bubblewrap", lambda _: ["/bin/sh", "-c", does])
    with pytest.raises(InputError, match=rf"cannot run a program here \(.*{said}.*user namespaces"):
        sandbox.Sandbox("bubblewrap")


@pytest.mark.parametrize("machine", sandbox_worker.SYSTEM_CALLS)
def test_the_filter_of_a_machine_lets_threads_start_and_no_process(machine):
    """Follows the filter as the kernel does."""
    import struct

    code = sandbox_worker.system_call_filter(machine)
    steps = [struct.unpack_from("HBBI", code, place) for place in range(0, len(code), 8)]
    architecture, clone, clone3, refused = sandbox_worker.SYSTEM_CALLS[machine]

    def verdict(number, flags=0, where=architecture):
        value, place = 0, 0
        fields = {0: number, 4: where, 16: flags}
        while True:
            kind, yes, no, operand = steps[place]
            place += 1
            if kind == 0x20:
                value = fields[operand]
            elif kind == 0x06:
                return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(operand, operand & 0xFFFF)
            else:
                tests = {0x15: value == operand, 0x35: value >= operand, 0x45: value & operand}
                place += yes if tests[kind] else no

    assert verdict(1) == verdict(clone, flags=0x3D0F00) == "allow"
    assert verdict(clone, flags=17) == 1
    assert verdict(clone3) == 38
    assert {verdict(int(number)) for number in refused.split()} == {1}
    assert verdict(1, where=0x40000003) == verdict(1 + 0x40000000) == "kill"
