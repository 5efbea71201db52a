"""Run a dsad command as several processes of this machine, as a pod runs it on several hosts.

    python -m dsad.launch_local -n 2 --devices 2 -- pretrain --config=configs/ds2.py:smoke \
        --workdir=runs/two

Without accelerators every process simulates ``--devices`` CPU devices. Lines of output begin with
the number of their process. When one process fails, all end; SIGTERM and Ctrl-C are passed on, so
that a training saves and exits with 0.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import IO

#: Seconds that the others get to tell why they end, before they are ended.
GRACE = 15.0


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes and wait; returns the first exit code that is not 0, else 0."""
    parser = argparse.ArgumentParser(prog="python -m dsad.launch_local", description=__doc__)
    parser.add_argument("-n", type=int, required=True, help="processes")
    parser.add_argument("--devices", type=int, default=1, help="simulated CPU devices of each")
    parser.add_argument("--port", type=int, default=0, help="of process 0; 0: a free one")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- COMMAND [--flags]")
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if args.n < 1 or args.devices < 1 or not command:
        parser.error("expected -n and --devices of at least 1, and -- COMMAND [--flags]")
    return launch(command, args.n, args.devices, args.port or free_port())


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def launch(command: Sequence[str], processes: int, devices: int, port: int) -> int:
    """Run ``dsad COMMAND`` as so many processes."""
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONUNBUFFERED": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "dsad", *command, f"--coordinator=localhost:{port}",
             f"--num-processes={processes}", f"--process-id={i}"],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            # Ctrl-C of the terminal reaches them through this process alone, and once.
            start_new_session=True,
        )
        for i in range(processes)
    ]  # fmt: skip
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _signal_all(running, signal.SIGTERM))
    readers = [threading.Thread(target=_relay, args=(i, p.stdout)) for i, p in enumerate(running)]
    for reader in readers:
        reader.start()
    code = _wait(running)
    for reader in readers:
        reader.join()
    return code


def _wait(running: Sequence[subprocess.Popen[str]]) -> int:
    """Wait for all; a while after one has failed, end those that are left."""
    failed = threading.Event()
    codes: list[int] = []

    def watch(process: subprocess.Popen[str]) -> None:
        code = process.wait()
        if code:
            codes.append(code)
            failed.set()

    watchers = [threading.Thread(target=watch, args=(p,)) for p in running]
    for watcher in watchers:
        watcher.start()
    while any(w.is_alive() for w in watchers):
        if failed.wait(0.2):
            for watcher in watchers:
                watcher.join(GRACE)
            _signal_all(running, signal.SIGKILL)
        for watcher in watchers:
            watcher.join(0.2)
    return next((c if c > 0 else 128 - c for c in codes), 0)


def _signal_all(running: Sequence[subprocess.Popen[str]], number: int) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(number)


def _relay(index: int, lines: IO[str] | None) -> None:
    for line in lines or ():
        if line.startswith("[Gloo] Rank"):  # its connections, several lines for every mesh
            continue
        print(f"[{index}] {line}", end="", flush=True)


if __name__ == "__main__":
    sys.exit(main())
