"""Python programs that tests run in processes of their own, forked from one that has transformers imported: the import
is some 4 seconds of processor time, and a run of the tests starts more than a hundred.

A forked process knows nothing of the tests, of kvloom or of the programs before it; what it shares with them is
what an import of torch and transformers leaves, and the seed of Python's hashes. What is promised of starting itself
(what is imported, how many threads there are) needs ``subprocess``.

Run as a program this file is the process that the others are forked from.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn, TextIO

_sending = threading.Lock()


@functools.cache
def _server() -> socket.socket:
    """The way to this process's server, which ends when this process does."""
    ours, theirs = socket.socketpair()
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}  # read when these are imported
    with theirs:
        theirs.set_inheritable(True)
        os.posix_spawn(sys.executable, [sys.executable, __file__, str(theirs.fileno())], env)
    return ours


class Program:
    """A program that was started: text for it, and what it writes."""

    def __init__(self, command: list[str], stdin: TextIO, stdout: TextIO, stderr: IO[bytes], status: IO[bytes]) -> None:
        self.command = command
        self.stdin = stdin
        self.stdout = stdout
        self._stderr = stderr
        self._status = status

    def finished(self) -> subprocess.CompletedProcess[str]:
        """Wait for its end: its exit status, and what it wrote that was not read yet."""
        with self.stdin, self.stdout, self._stderr, self._status:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.close()
            out, code = self.stdout.read(), int(self._status.read())
            self._stderr.seek(0)
            return subprocess.CompletedProcess(self.command, code, out, self._stderr.read().decode())


def start(arguments: Sequence[object], *, env: Mapping[str, str] | None = None, strict: bool = True) -> Program:
    """``python ARGUMENTS`` (a file, or -c CODE, and what is for it); ``strict``: warnings are errors."""
    command = list(map(str, arguments))
    own = {"command": command, "env": dict(env or os.environ), "cwd": os.getcwd(), "path": sys.path, "strict": strict}
    errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed when the program has finished
    with tempfile.TemporaryFile() as request:
        request.write(json.dumps(own).encode())
        request.seek(0)
        (stdin, to), (out, stdout), (ended, status) = os.pipe(), os.pipe(), os.pipe()
        try:
            with _sending:
                fds = [request.fileno(), stdin, stdout, errors.fileno(), status]
                socket.send_fds(_server(), [b"."], fds)
        finally:
            for each in (stdin, stdout, status):
                os.close(each)
    return Program(command, open(to, "w"), open(out), errors, open(ended, "rb"))


def run(
    arguments: Sequence[object], *, env: Mapping[str, str] | None = None, strict: bool = True
) -> subprocess.CompletedProcess[str]:
    """``start`` and wait for its end."""
    return start(arguments, env=env, strict=strict).finished()


def _serve(requests: socket.socket) -> None:
    """Fork a process for each request, until there are no more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while True:
        byte, fds, _, _ = socket.recv_fds(requests, 1, 5)
        if not byte:
            return
        if os.fork() == 0:
            requests.close()
            _watch(fds)
        for fd in fds:
            os.close(fd)


def _watch(fds: list[int]) -> NoReturn:
    """Run what is wanted in another process, and write how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *files, status = fds
    pid = os.fork()
    if pid == 0:
        os.close(status)
        _become(*files)
    for fd in files:
        os.close(fd)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(status, str(ended).encode())
    os._exit(0)


def _become(request: int, *standard: int) -> NoReturn:
    """Be the program, and end as Python does."""
    code = 1
    try:
        for number, fd in enumerate(standard):
            os.dup2(fd, number)
        with open(request, "rb") as file:
            wanted = json.load(file)
        for fd in standard:
            os.close(fd)
        _program(wanted)
        code = 0
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
        else:
            code = left.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _program(wanted: dict[str, Any]) -> None:
    os.environ.clear()
    os.environ.update(wanted["env"])
    os.chdir(wanted["cwd"])
    if wanted["strict"]:
        warnings.simplefilter("error")
    own = [each for each in wanted["env"].get("PYTHONPATH", "").split(os.pathsep) if each]
    first, *rest = wanted["command"]
    sys.path[:] = [*own, *wanted["path"]]
    if first == "-c":
        sys.argv = ["-c", *rest[1:]]
        main = type(sys)("__main__")
        sys.modules["__main__"] = main
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = wanted["command"]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    import tokenizers  # noqa: F401
    import torch  # noqa: F401
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    transformers.AutoModelForCausalLM, transformers.PreTrainedTokenizerFast  # noqa: B018
    with socket.socket(fileno=int(sys.argv[1])) as given:
        _serve(given)
