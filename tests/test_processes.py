"""The tests' own way to start programs: what they print is never taken for an answer, and nothing of them is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import script_environment
from processes import Forks, eventually, forks, session, stat

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def server() -> Iterator[Forks]:
    with forks(f"import sys; sys.path.append({str(TESTS)!r}); import processes", script_environment()) as running:
        yield running


def test_what_a_process_prints_is_no_answer(server: Forks) -> None:
    leader = server.start("print(0, flush=True); os.system('echo started 1; echo ended 0'); sys.exit(7)")
    assert leader > 1
    assert server.status(30) == 7


def test_a_script_is_what_python_makes_of_it(server: Forks, tmp_path: Path) -> None:
    """Against a new interpreter: arguments, folder, a module beside the script, both streams, exit status."""
    (tmp_path / "beside.py").write_text("NAME = 'beside'\n")
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, beside\n"
        "print(__name__, sys.argv, os.getcwd(), os.environ.get('ONE'), beside.NAME, sys.stdin.read())\n"
        "sys.exit('the end')\n"
    )
    words, environment = [str(script), "--a", "b c"], {**script_environment(), "ONE": "1"}
    found = server.run(words, tmp_path, [environment], 30)
    wanted = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (found.returncode, found.stdout, found.stderr) == (wanted.returncode, wanted.stdout, wanted.stderr)
    assert "ONE" not in os.environ
    module = server.run(["-m", "beside"], tmp_path, [environment], 30)
    assert (module.returncode, module.stdout) == (0, "")


def test_a_script_that_does_not_end_is_killed_with_its_family(server: Forks, tmp_path: Path) -> None:
    script, pids = tmp_path / "endless.py", tmp_path / "pids"
    script.write_text(
        "import os, subprocess, time\n"
        "child = subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "print('here', flush=True); time.sleep(1000)\n"
    )
    with pytest.raises(subprocess.TimeoutExpired) as raised:
        server.run([str(script)], tmp_path, [script_environment()], 5)
    assert raised.value.output == b"here\n"
    family = [int(pid) for pid in pids.read_text().split()]
    assert eventually(lambda: all(stat(pid)[:1] in ([], ["Z"]) for pid in family), 30)
    server.start("sys.exit(3)")  # and the next answer is the next process's
    assert server.status(30) == 3


def test_ranks_run_at_once_and_end_together(server: Forks, tmp_path: Path) -> None:
    """The first waits for the second's file, and then for ever, when the second has failed."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys, time; from pathlib import Path\n"
        "print(os.environ['ONE'], flush=True)\n"
        "if os.environ['ONE'] == 'b': Path('there').touch()\n"
        "while not Path('there').exists(): time.sleep(0.01)\n"
        "if sys.argv[1] == 'fail': sys.exit(7) if os.environ['ONE'] == 'b' else time.sleep(1000)\n"
    )
    environments = [{**script_environment(), "ONE": one} for one in "ab"]
    for word, status in (("pass", 0), ("fail", 1)):
        (tmp_path / "there").unlink(missing_ok=True)
        found = server.run([str(script), word], tmp_path, environments, 30)
        assert (found.returncode, sorted(found.stdout.split())) == (status, ["a", "b"])


def test_lines_of_ranks_are_whole(server: Forks, tmp_path: Path) -> None:
    """Two writes a line, as an unbuffered print makes them, would be cut by the other rank's."""
    script = tmp_path / "rank.py"
    script.write_text(
        "import os, sys\nfor i in range(5000): print(os.environ['ONE'], file=(sys.stdout, sys.stderr)[i % 2])"
    )
    environments = [{**script_environment(), "ONE": one} for one in ("first", "second")]
    found = server.run([str(script)], tmp_path, environments, 60)
    for printed in (found.stdout, found.stderr):
        assert sorted(set(printed.split("\n"))) == ["", "first", "second"]


def test_the_session_of_the_machine_is_refused() -> None:
    with pytest.raises(AssertionError, match="machine"):
        session(0)
