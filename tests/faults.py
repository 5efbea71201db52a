"""Faulty calls of all commands: ``python tests/faults.py [COUNT [SEED [KIND]]]``.

Each call has one fault, drawn by the seed. It must end with a message and a code, without a
traceback, with nothing half-written and its inputs as they were; the same command without the fault
must work in the same place. Exit code 1 and a line per call that breaks this.
"""

import collections
import os
import pathlib
import random
import re
import shlex
import shutil
import signal
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import ml_collections
import numpy as np
import PIL.Image

from tests import forks
from tests.forks import Call

PICS, MODEL, RUN, EVAL = "Bilder ä", "Modelle/eins", "Läufe/r 1", "Läufe/e 1"
DATA = ("--config.data.name=folder", f"--config.data.normal={PICS}/gut")
BOTH = (*DATA, f"--config.data.abnormal={PICS}/schlecht")
NET = (
    "--config=knn", "--config.weights=random", "--config.detector.layers=('layer1',)",
    "--config.detector.sigma=1.0", "--config.evaluation.image_size=32",
    "--config.evaluation.batch_size=4",
)  # fmt: skip
ROWS = (
    "--config=compare:smoke", "--config.skip=('*/patches/*', '*/padim')", "--config.seeds=(0,)",
    *(a.replace(".data.", ".datasets.tiles.") for a in BOTH),
    "--config.datasets.tiles.categories=()",
    "--config.evaluation.image_size=32", "--config.evaluation.batch_size=4",
)  # fmt: skip
TRAIN = ("--config=mae:smoke", *DATA, "--config.data.canvas=48", "--config.batch_size=4")
#: By name: the arguments, and the inputs that make them fail.
COMMANDS = {
    "check-data": (["check-data", *BOTH], [PICS]),
    "prepare": (["prepare", *BOTH, "--out={out}"], [PICS]),
    "fit": (["fit", *NET, *DATA, "--out={out}"], [f"{PICS}/gut"]),
    "predict": (["predict", MODEL, PICS, "--out={out}"], [MODEL, PICS]),
    "evaluate": (["evaluate", *NET, *BOTH, "--workdir={out}"], [PICS]),
    "evaluate a model": (
        ["evaluate", f"--model={MODEL}", *BOTH, "--workdir={out}"], [MODEL, f"{PICS}/gut"],
    ),
    "compare": (["compare", *ROWS, "--workdir={out}"], [PICS]),
    "pretrain": (["pretrain", *TRAIN, "--config.steps=3", "--workdir={out}"], [f"{PICS}/gut"]),
    "report": (["report", EVAL, "--out={out}/r.html"], [f"{EVAL}/results.json"]),
    "export": (["export", f"--backbone=run:{RUN}", "--out={out}"], [f"{RUN}/config.json"]),
    "plan": (["plan", "--config=mae:smoke", "--samples=40", "--cache=off", "--json={out}/p.json"],
             []),
    "bench": (["bench", "neighbors", "--queries=64", "--rows=64", "--depth=8", "--rounds=1",
               "--k=1"], []),
    "demo": (["demo", "--config=demo:smoke", "--workdir={out}"], []),
}  # fmt: skip
#: Those without a demo, which takes too long to be repeated.
QUICK = [name for name in COMMANDS if name != "demo"]
WRITING = [name for name in QUICK if name not in ("check-data", "bench")]
WITH_CONFIG = [name for name in COMMANDS if any("--config" in a for a in COMMANDS[name][0])]
OUT = "Aus gabe"


def arguments(name, out=OUT):
    return [a.replace("{out}", out) for a in COMMANDS[name][0]]


def build(base):
    """Pictures, a model, a run and an evaluation; the seconds that commands take."""
    draw = np.random.default_rng(0)
    for folder, count, bright in (("gut", 8, 90), ("schlecht", 3, 160)):
        for i in range(count):
            image = np.clip(draw.normal(bright, 20, (48, 40, 3)), 0, 255).astype(np.uint8)
            path = base / PICS / folder / f"Bild {i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(image).save(path)
    seconds = {}
    for name, place in (("fit", MODEL), ("evaluate", EVAL), ("pretrain", RUN)):
        ended = forks.run(Call(arguments(name, place)), base)
        assert ended.code == 0, ended.text
    for number, name in enumerate((*QUICK, *QUICK)):  # what was compiled serves the next
        ended = forks.run(Call(arguments(name, f"warm/{number}")), base)
        assert ended.code == 0, (name, ended.text)
        seconds[name] = ended.seconds
    shutil.rmtree(base / "warm")
    return seconds


# --- kinds of faults: each gives a call, and whether nothing at all may be written


def spoilt(draw, folder, seconds):
    """An input is missing, unreadable, truncated or something else."""
    name = draw.choice([n for n in QUICK if COMMANDS[n][1]])
    place = folder / draw.choice(COMMANDS[name][1])
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
    picture = files[0].suffix == ".png"
    how = draw.choice([h for h in forks.HOW if not picture or h not in ("missing", "folder")])
    file = draw.choice(files)
    forks.spoil(file, how, draw)
    return name, Call(arguments(name)), f"{how} {file.name}"


def wrong_path(draw, folder, seconds):
    """An argument names what is not there, or something else."""
    name = draw.choice([n for n in QUICK if COMMANDS[n][1]])
    (folder / "Text.txt").write_text("x")
    (folder / "leer").mkdir()
    wrongs = ["nirgends", "leer", "leer/*.png", "Text.txt/x"]
    if name != "predict":  # tells of files that are no pictures, and goes on
        wrongs += ["Text.txt", "/proc/self/mem"]
    wrong = draw.choice(wrongs)
    named = [
        p for p in (MODEL, RUN, EVAL, f"{PICS}/gut", PICS) if any(p in a for a in arguments(name))
    ]
    old = draw.choice(named)
    argv = [a.replace(old, wrong) for a in arguments(name)]
    return name, Call(argv), f"{old} → {wrong}"


def wrong_key(draw, folder, seconds):
    """A key or flag that does not exist, or has another type; a config that is none."""
    name = draw.choice(WITH_CONFIG)
    argv, kind = arguments(name), draw.randrange(4)
    if kind == 0 or name == "evaluate a model":
        config = draw.choice(_CONFIGS)
        (folder / "own.py").write_bytes(config)
        argv = [a for a in argv if not a.startswith("--config=")]
        return name, Call([argv[0], "--config=own.py", *argv[1:]]), repr(config)
    if kind == 1:
        flag = draw.choice(_FLAGS)
        return name, Call([*argv, flag]), flag
    keys = _keys(next((a[9:] for a in argv if a.startswith("--config=")), "data"))
    key, value = draw.choice(sorted(keys.items(), key=str))
    if kind == 2:
        at = draw.randrange(len(key))
        wrong = f"--config.{key[:at]}q{key[at + 1 :]}x=1"
    else:
        wrong = f"--config.{key}={draw.choice(_WRONG[type(value).__name__])}"
    return name, Call([*argv, wrong]), wrong


_CONFIGS = (
    b"", b"def get_config(:\n", b"def get_config():\n    return 1 / 0\n", b"\xff\xfe\x00",
    b"def get_config():\n    return 3\n", b"import nowhere\n",
    b"import ml_collections\ndef get_config():\n    return ml_collections.ConfigDict({'a': 1})\n",
)  # fmt: skip
_FLAGS = (
    "--nowhere", "--overwrit", "--out", "--workdir", "--config.", "--config", "--config=nowhere.py",
    "--config=knn:nowhere", "extra", "--overwrite=perhaps", "--coordinator=a", "--num_processes=x",
    "--config.data.name=mvtek", "--config.data.name=mvtec",
)  # fmt: skip
_WRONG = {
    "int": ("abc", "1.5", "None", "(1,)", ""), "float": ("abc", "(1.0,)", ""),
    "bool": ("maybe", "3", "()"), "str": ("\udcff",), "tuple": ("('a'", "{1: 2}"),
    "NoneType": ("(",),
}  # fmt: skip


def _keys(spec):
    from dsad.terminal import flags

    config, _, _ = flags.Command("x", "", config=spec).parse([])
    flat = {}

    def walk(node, where):
        for key, value in node.items():
            if isinstance(value, ml_collections.ConfigDict):
                walk(value, f"{where}{key}.")
            elif not isinstance(value, str):
                flat[f"{where}{key}"] = value

    walk(config, "")
    del sys.modules["config_config"]  # an empty file would be taken for it
    return flat


def wrong_place(draw, folder, seconds):
    """The output is a file, lies in one, holds other things, or cannot be written."""
    name = draw.choice([*WRITING, "demo"])
    (folder / "Text.txt").write_text("x")
    (folder / "fremd/r.html").mkdir(parents=True)
    (folder / "fremd/p.json").mkdir()
    (folder / "fremd/config.json").write_text('{"mine": 1}')
    (folder / "fremd/model.safetensors").write_text("mine")
    places = ["Text.txt", "Text.txt/x", "fremd", "/proc/nowhere/x", "/proc/version", "x" * 300]
    if name not in ("report", "plan"):
        places += [""]
    place = draw.choice(places)
    return name, Call(arguments(name, place)), place[:20]


def full(draw, folder, seconds):
    """No file can grow beyond some bytes, or the output goes to a full disk."""
    name = draw.choice(QUICK)
    if draw.random() < 0.2:
        return name, Call(arguments(name), stdout="/dev/full"), "standard output"
    size = int(10 ** draw.uniform(0, 6.5))
    return name, Call(arguments(name), file_size=size), f"{size} bytes"


def interrupted(draw, folder, seconds):
    """Ctrl-C or SIGTERM at any moment, in some while everything is still imported."""
    name = draw.choice(QUICK)
    fresh = draw.random() < 0.2
    limit = 3 + seconds[name] if fresh else 1.1 * seconds[name]
    number = draw.choice([signal.SIGINT, signal.SIGINT, signal.SIGTERM])
    call = Call(arguments(name), signal=number, fresh=fresh)
    call.delay = draw.uniform(0, limit)
    return name, call, f"{number.name} after {call.delay:.2f} of {seconds[name]:.2f} s"


KINDS = {
    spoilt: 5, wrong_path: 3, wrong_key: 5, wrong_place: 4, full: 3, interrupted: 5,
}  # fmt: skip
_REFUSED = (wrong_path, wrong_key, wrong_place)


# --- what must hold


#: What copies images as they are, or leaves held-out ones alone.
_UNREAD = ("prepare", "pretrain", "evaluate a model")


def faults_of(kind, name, what, call, ended):
    if re.search("Traceback|Exception ignored|Fatal Python|\\bat 0x", ended.text):
        yield "a traceback"
    allowed = {1, 2, 3}
    if kind is interrupted:
        allowed = {128 + call.signal, 0}
        if ended.text and "stopped" not in ended.text:
            allowed.add(-call.signal)  # all was said, and Python was about to end
    elif (kind is full and not call.stdout) or (
        kind is spoilt and name in _UNREAD and what.endswith(".png")
    ):
        allowed = {0, 1, 2, 3}
    if ended.code not in allowed:
        yield f"exit code {ended.code}"
    if ended.code and not ended.text.strip():
        yield "no message"


def tried(kind, number, draw, base, seconds):
    """One faulty call and its retry; (name, what, seconds, what is wrong)."""
    folder = base.with_name(f"call {number}")
    forks.linked(base, folder)
    name, call, what = kind(draw, folder, seconds)
    before = forks.snapshot(folder)
    ended = forks.run(call, folder)
    wrong = list(faults_of(kind, name, what, call, ended))
    after = forks.snapshot(folder)
    wrong += [f"changed {p}" for p in before if after.get(p) != before[p]]
    strays = [p for p in after.keys() - before.keys() if "__pycache__" not in p]
    if kind in _REFUSED:
        wrong += [f"wrote {p}" for p in strays]
    wrong += [f"stray {p}" for p in strays if not p.startswith(str(folder / OUT))]
    wrong += [f"left {p.name}" for p in folder.iterdir() if p.name.startswith(f".{OUT}")]
    if (folder / OUT).exists():
        wrong += forks.unfinished(folder / OUT)
    told = ended.text
    if (folder / OUT).exists() and not wrong and kind not in _REFUSED:
        complete = re.search("^written|use it with", told, re.M) or ended.code == 0
        again = retried(name, base, folder, complete)
        if again.code != 0:
            wrong.append(f"the retry ends with {again.code}")
            told += f"--- retry\n{again.text}"
        wrong += forks.unfinished(folder / OUT) if (folder / OUT).exists() else []
    if not wrong:
        shutil.rmtree(folder)
    return name, what, call, ended.code, wrong, told


def retried(name, base, folder, complete):
    """The command without the fault in the same place; what its message says, if it says how."""
    for place in (PICS, "Modelle", "Läufe"):
        shutil.rmtree(folder / place)
    forks.linked(base, folder)
    ended = forks.run(Call(arguments(name)), folder)
    if ended.code == 2 and (said := re.search(r"^  (dsad .*)$", ended.text, re.M)):
        ended = forks.run(Call(shlex.split(said[1])[1:]), folder)
    elif ended.code == 2 and complete and "--overwrite" in ended.text:
        ended = forks.run(Call([*arguments(name), "--overwrite"]), folder)
    return ended


def main(count=40, seed=0, only=""):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    cache = pathlib.Path(tempfile.gettempdir(), "dsad-faults-cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    os.environ["PYTHONPATH"] = sys.path[0]
    forks.preload()
    counts, bad = collections.Counter(), collections.Counter()
    # A fork must not remove it where it ends.
    root = tempfile.mkdtemp(prefix="dsad-faults-")
    base = pathlib.Path(root, "base ü")
    seconds = build(base)
    print({name: round(s, 1) for name, s in seconds.items()}, flush=True)
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        kinds = [k for k in KINDS if only in k.__name__]
        kind = draw.choices(kinds, [KINDS[k] for k in kinds])[0]
        name, what, call, code, wrong, told = tried(kind, number, draw, base, seconds)
        counts[kind.__name__, code] += 1
        if wrong:
            bad[kind.__name__] += 1
            print(f"BAD {number} {name}: {kind.__name__}, {what}: {'; '.join(wrong)}")
            print(f"  {shlex.join(call.argv)}\n{told[-3000:]}\n", flush=True)
    if not bad:
        shutil.rmtree(root)
    for (kind, code), times in sorted(counts.items()):
        print(f"{kind:12} exit code {code}: {times}")
    print(f"{sum(counts.values())} calls, {sum(bad.values())} bad {dict(bad)}")
    return 1 if bad else 0


if __name__ == "__main__":
    given = sys.argv[1:]
    sys.exit(main(*map(int, given[:2]), *given[2:]))
