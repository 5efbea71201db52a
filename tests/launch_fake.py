"""Stands in for gcloud, git, dsad and others in the tests of launch/; imports the standard library.

One file under many names, each a script that calls ``main``. Every call is recorded in $FAKE/calls
as a line of JSON. Two workers are simulated by two home directories: what gcloud's ssh is given is
really executed there. What dsad does is said by $FAKE/plan, a word for each slice that was created,
or each run where there is none; $FAKE/plan-N is that of worker N, or of process N of srun:

  complete  makes all steps          stopped  saves and exits, as after SIGTERM
  crash     exits with 1             refuse   exits with 2
  wait      runs until SIGTERM       preempt  SUSPENDED, runs until the slice is deleted
  deaf      runs, does not catch     early    it and all beside it get SIGTERM, which it does not
            SIGTERM                           catch
  lost      its machine loses it     flaky    exits with 3 the first time, completes then
  killed    SIGTERM, it alone

Verbs of gcloud that are named in $FAKE/fail fail, once for each time that they stand there. srun
starts as many processes as $FAKE/tasks says.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

FAKE = pathlib.Path(os.environ["FAKE"])
LAUNCH = pathlib.Path(os.environ["FAKE_LAUNCH"])
HOMES = [FAKE / "worker-0", FAKE / "worker-1"]
REVISION = "0123456789abcdef0123456789abcdef01234567"


def become(state: str) -> None:
    """Set the slice's state at once: other stand-ins look at it all the time."""
    new = FAKE / f"state.{os.getpid()}"
    new.write_text(state)
    new.replace(FAKE / "state")


def read(name: str, default: str) -> str:
    path = FAKE / name
    return path.read_text() if path.exists() else default


def value(args: list[str], flag: str) -> str:
    return next((a.partition("=")[2] for a in args if a.startswith(f"{flag}=")), "")


def gcloud(args: list[str]) -> int:
    if args[:2] == ["storage", "cat"]:
        print('{"step": 10}')
    if args[:2] != ["compute", "tpus"]:
        return 0
    verb = args[3]
    failing = read("fail", "").split()
    if verb in failing:
        failing.remove(verb)
        (FAKE / "fail").write_text(" ".join(failing))
        return 1
    if args[2] == "tpu-vm":
        return {"ssh": ssh, "scp": scp}[verb](args)
    if verb == "create":
        if read("state", "WAITING_FOR_RESOURCES") not in ("", "WAITING_FOR_RESOURCES"):
            return 1  # the name is taken
        (FAKE / "created").write_text(str(int(read("created", "0")) + 1))
        become("WAITING_FOR_RESOURCES")
    elif verb == "list":
        state = read("state", "")
        print(state)
        if state == "WAITING_FOR_RESOURCES":
            become(read("granted", "ACTIVE"))
    elif verb == "delete":
        become("")
        for home in HOMES:
            shutil.rmtree(home, ignore_errors=True)
    return 0


def ssh(args: list[str]) -> int:
    worker, command = value(args, "--worker"), value(args, "--command")
    codes = []
    for home in HOMES if worker == "all" else [HOMES[int(worker)]]:
        home.mkdir(exist_ok=True)
        done = subprocess.run(
            ["bash", "-c", command], cwd=home, env={**os.environ, "HOME": str(home)}, text=True,
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        print(done.stdout, end="")
        codes.append(done.returncode)
    return max(codes)


def scp(args: list[str]) -> int:
    source, destination = args[4], args[5].partition(":")[2]
    for home in HOMES:
        home.mkdir(exist_ok=True)
        shutil.copy(source, home / destination)
    return 0


def git(args: list[str]) -> int:
    if args[0] == "clone":
        shutil.copytree(LAUNCH, pathlib.Path(args[-1]) / "launch")
    elif "rev-parse" in args:
        print(REVISION)
    elif "status" in args:
        print(read("uncommitted", ""), end="")
    elif "archive" in args:
        import tarfile  # takes longer than most calls

        with tarfile.open(value(args, "--output"), "w:gz") as archive:
            archive.add(LAUNCH, "launch")
    return 0


def python3(args: list[str]) -> int:
    """pip and uv on a worker: an environment is a folder with dsad, that is this file, in it."""
    if args[:3] == ["-m", "uv", "venv"]:
        folder = pathlib.Path(args[-1]) / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(FAKE / "bin" / "dsad", folder / "dsad")
        shutil.copy(FAKE / "bin" / "python", folder / "python")
    return 0


def python(args: list[str]) -> int:
    """The real one, but for processes on this machine and for buckets, which are folders here."""
    if args[:2] == ["-m", "dsad.launch_local"]:
        record("dsad", args[args.index("--") + 1 :])
        return 0
    args = [a.replace("gs://", f"{FAKE}/") for a in args]
    return subprocess.run([os.environ["FAKE_PYTHON"], *args]).returncode


def dsad(args: list[str]) -> int:
    if args[0] != "pretrain":
        print("done")
        return 0
    home = pathlib.Path(os.environ["HOME"])
    number = os.environ.get("SLURM_PROCID", home.name.rpartition("-")[2])
    words = read(f"plan-{number}", read("plan", "complete")).split()
    word = words[min(int(read("created", "1")), len(words)) - 1]
    if word in ("wait", "preempt"):
        asked = []
        signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
        print("step 1", flush=True)
        if word == "preempt":
            become("SUSPENDED")
        end = time.monotonic() + 60
        while not asked and time.monotonic() < end and (home / "dsad-run").exists():
            time.sleep(0.02)
        print("stopped and saved")
    elif word == "deaf":
        (FAKE / "deaf").touch()
        time.sleep(60)
    elif word == "killed":
        os.kill(os.getpid(), signal.SIGTERM)
    elif word == "early":
        os.killpg(0, signal.SIGTERM)
        time.sleep(60)
    elif word == "lost":
        while not (home / "dsad-run" / "pid").exists():
            time.sleep(0.02)
        os.killpg(int((home / "dsad-run" / "group").read_text()), signal.SIGKILL)
    elif word == "flaky" and not (home / "failed").exists():
        (home / "failed").touch()
        return 3
    elif word in ("complete", "flaky"):
        workdir = value(args, "--workdir").replace("gs://", f"{FAKE}/")
        pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
        pathlib.Path(workdir, "complete.json").write_text('{"step": 10}')
    print(word)
    return {"crash": 1, "refuse": 2}.get(word, 0)


def srun(args: list[str]) -> int:
    """Ends all processes when one fails; a signal is a worse end than any code, as in SLURM."""
    assert args[0] == "--kill-on-bad-exit=1"
    running = [
        subprocess.Popen(
            args[1:], env={**os.environ, "SLURM_PROCID": str(i)}, start_new_session=True
        )
        for i in range(int(read("tasks", "1")))
    ]
    while None in [process.poll() for process in running]:
        if any(process.returncode for process in running):
            for process in running:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
        time.sleep(0.02)
    codes = [process.returncode for process in running]
    return 128 - min(codes) if min(codes) < 0 else max(codes)


def sbatch(args: list[str]) -> int:
    own = next(i for i, a in enumerate(args) if not a.startswith("-"))
    slurm = {
        "SLURM_JOB_ID": "41", "SLURM_NTASKS_PER_NODE": "8", "SLURM_GPUS_PER_NODE": "8",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }  # fmt: skip
    if value(args, "--array"):
        slurm |= {"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "0"}
    return subprocess.run(["bash", *args[own:]], env={**os.environ, **slurm}).returncode


def record(name: str, args: list[str]) -> None:
    line = json.dumps([name, *args]) + "\n"
    with (FAKE / "calls").open("a") as file:
        file.write(line)


def main() -> None:
    """The call that started this process, under the name it was called by."""
    name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
    record(name, args)
    sys.exit(globals().get(name, lambda args: 0)(args))
