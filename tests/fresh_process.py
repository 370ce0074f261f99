"""Python processes that have imported nothing of this package, started in a moment.

Importing torch and Transformers takes most of the time of a test that starts Python. Here one process imports them
once and is then forked for every call. It serves as a program: a request a line on its input, an answer a line on its
output.
"""

import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
# slow to import, and loaded by nearly everything here; `evaluate` is not, whose name scripts/evaluate.py could take
PRELOADED = (
    "torch",
    "transformers",
    "transformers.trainer",
    "accelerate",
    "datasets",
    "scipy.optimize",
    "matplotlib.figure",
)


class FreshProcesses:
    """Runs scripts and code in forks of one prepared process; a context manager."""

    def __enter__(self) -> "FreshProcesses":
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        self._one_at_a_time = threading.Lock()
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        return self

    def __exit__(self, *_) -> None:
        # an empty line: the end of the input does not come while a fork of this process holds the other end, too
        self._server.stdin.write("\n")
        self._server.stdin.close()
        self._server.wait(timeout=60)

    def script(self, path: Path, *arguments, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
        """As `python PATH ARGUMENTS`, the script's folder first on the path."""
        return self._call({"script": str(path)}, arguments, cwd)

    def code(self, source: str, *arguments, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess:
        """As `python -c SOURCE ARGUMENTS`."""
        return self._call({"code": source}, arguments, cwd)

    def _call(self, what: dict, arguments: tuple, cwd: Path) -> subprocess.CompletedProcess:
        words = [str(argument) for argument in arguments]
        with self._one_at_a_time, tempfile.TemporaryDirectory() as folder:
            request = what | {"arguments": words, "cwd": str(cwd), "output": folder}
            self._server.stdin.write(json.dumps(request) + "\n")
            self._server.stdin.flush()
            status = int(self._server.stdout.readline())
            texts = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess([*what.values(), *words], status, *texts)


def run(request: dict) -> None:
    """What the fork does; it never returns to the caller."""
    status = 1
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(Path(request["output"]) / name, os.O_CREAT | os.O_WRONLY), number)
    try:
        os.chdir(request["cwd"])
        if "script" in request:
            sys.argv = [request["script"], *request["arguments"]]
            sys.path[0] = str(Path(request["script"]).parent)
            runpy.run_path(request["script"], run_name="__main__")
        else:
            sys.argv, sys.path[0] = ["-c", *request["arguments"]], ""
            exec(compile(request["code"], "<code>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve() -> None:
    import importlib

    for name in PRELOADED:
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)
    for line in iter(sys.stdin.readline, "\n"):
        if not line:
            break
        child = os.fork()
        if child == 0:
            run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
