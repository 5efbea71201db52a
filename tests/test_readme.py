"""Every command block of the README runs, on small data and with short lengths."""

import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.data import published_trees, trees
from tests.helpers import ROOT, alone, command
from tests.models.test_models import fold, torch_names

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
#: What fresh-environment checks run; tests only make sure that they are what is documented.
SETUP = {"pip install -e . && dsad demo", 'pip install -e ".[test]" && pytest'}
#: Shorter runs: appended to the command, so that every documented flag is still parsed.
SHORT = {
    "demo": ["--config=configs/demo.py:smoke"],
    "pretrain": [
        "--config.steps=2", "--config.batch_size=4", "--config.data.canvas=32",
        "--config.log_every=1",
    ],
    "pretrain --config=configs/ds2.py": [
        "--config.objective.hidden=8", "--config.objective.out=4",
        "--config.objective.view1.side=32", "--config.objective.view2.side=32",
    ],
    "pretrain --config=configs/corrupt.py": ["--config.objective.view.side=64"],
    **{
        f"pretrain --config=configs/{name}.py": [
            "--config.objective.last=layer3", "--config.objective.spd.triplet.view.side=32",
            *(f"--config.objective.{view}.side=32" for view in views),
        ]
        for name, views in {"simsiam": ("view1", "view2"), "supervised": ("view",)}.items()
    },
    "pretrain --config=configs/cutpaste.py": [
        "--config.objective.hidden=(32, 16)", "--config.objective.view.side=32",
    ],
    "pretrain --config=configs/mae.py": [
        "--config.objective.encoder.width=24", "--config.objective.encoder.patch=8",
        "--config.objective.decoder.width=24", "--config.objective.view.side=32",
    ],
    "pretrain --config=configs/isstad.py": [
        "--config.objective.encoder.width=24", "--config.objective.encoder.patch=8",
        "--config.objective.decoder.width=24", "--config.objective.side=32",
    ],
    "evaluate": ["--config.evaluation.image_size=32", "--config.evaluation.batch_size=4"],
    "--config.evaluation.resize=windows": ["--config.evaluation.overlap=4"],
    "compare": ["--config.evaluation.image_size=32", "--config.evaluation.batch_size=4"],
    "fit": ["--config.evaluation.image_size=32", "--config.evaluation.batch_size=4"],
    # Compiling for a slice needs libtpu and minutes: tests of its own do that.
    "plan": ["--topology=local", "--cache=off", "--config.mesh.fsdp=1"],
    "pretrain --config=configs/adpretrain.py": [
        "--config.objective.side=32", "--config.objective.slots=8",
        "--config.objective.references=(1,2)", "--config.batch_size=2",
    ],
    "--config=configs/twoclass.py:5shot,mtd": [
        "--config.detector.recipe.steps=1", "--config.shots=1", "--config.seeds=(0,)",
    ],
    # A seed has a run of its own.
    "compare --config=configs/compare.py": ["--config.seeds=(0,)"],
    "--config=configs/compare.py:representations": [
        "--config.shots=(1, 0)",
        "--config.skip=('toothbrush/*', 'cookie/*', '*/mobilenetv2/*', '*/squeezenet/*', "
        "'*/corrupt/*', '*/spd/*', '*/1-shot/padim', '*/resnet18/anomalydino', '*/resnet18/rad', "
        "'*/ds2/anomalydino', '*/ds2/rad', '*/mae/padim')",
    ],
    "--config=configs/compare.py:adpretrain,trained": [
        "--config.settings.glass.detector.recipe.steps=1",
        "--config.settings.simplenet.detector.recipe.steps=1",
    ],
    "plan --config=configs/mae_imagenet.py": [
        "--config.batch_size=4", "--config.data.canvas=32",
        "--config.objective.encoder.width=64", "--config.objective.encoder.depth=2",
        "--config.objective.decoder.width=64", "--config.objective.decoder.depth=1",
    ],
    "plan --config=configs/mae.py": [
        "--config.objective.encoder.width=24", "--config.objective.encoder.depth=1",
        "--config.objective.decoder.width=24", "--config.objective.decoder.depth=1",
    ],
    "plan --config=configs/superadd.py": [
        "--config.backbone=vit_tiny_patch16_224", "--config.detector.depth=12",
        "--config.evaluation.image_size=32", "--config.evaluation.overlap=8",
    ],
    "bench step": ["--rounds=1", "--config.batch_size=4"],
    "bench step --config=configs/ds2.py": ["--config.objective.hidden=8"],
    "bench neighbors": ["--rounds=1", "--queries=64", "--rows=99", "--depth=8", "--k=1"],
    "bench coreset": ["--rounds=1", "--rows=200", "--dim=8"],
    "bench mutual": ["--rounds=1", "--images=5", "--tokens=6", "--depth=4"],
    "bench aupro": ["--rounds=1", "--maps=4", "--size=32"],
    "bench input": [
        "--config=configs/mae.py:smoke", "--rounds=1", "--images=8", "--batch=4", "--batches=1",
        "--canvas=64", "--workers=1", "--steps=1",
    ],
    "bench predict": ["--rounds=1", "--side=64"],
    "bench views": ["--rounds=1", "--side=16", "--canvas=20", "--batch=2"],
    "bench gde": ["--rounds=1", "--images=8", "--side=3", "--channels=6", "--components=3"],
    # The small data have three training images a category.
    "--config.shots=4": ["--config.shots=2"],
    "--config=configs/gde.py": ["--config.detector.components=2"],
    "--config.weights=imagenet": ["--config.weights=random"],  # of the hub
    "--stream=100000": ["--stream=402"],
}  # fmt: skip
#: The run that other blocks take their encoder from; they may be tested in another process.
BASE = "--workdir=runs/mine"


def shortened(words: list[str]) -> list[str]:
    """What to append to a command so that it takes seconds."""
    file = next((w.partition(":")[0] for w in words if w.startswith("--config=")), "")
    topic = " ".join(words[:2]) if words[0] == "bench" else words[0]
    keys = [words[0], topic, f"{topic} {file}", file, *words]
    return [flag for key in dict.fromkeys(keys) for flag in SHORT.get(key, [])]


def commands(block: str) -> list[str]:
    lines = block.replace("\\\n", " ").splitlines()
    return [re.sub(r"\s+", " ", x).strip() for x in lines if x.strip() and not x.startswith("#")]


ALL = [command for block in BLOCKS for command in commands(block)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working directory with small data under the names that the README uses."""
    base = tmp_path_factory.mktemp("readme")
    trees.mvtec(base / "data" / "mvtec")
    for name in ("mvtec/bottle256", "mvtec/toothbrush_reheld256", "lookout/cookie_288x384"):
        shutil.copytree(base / "data" / "mvtec" / "disc", base / "data" / name)
    trees.mtd_grouped(base / "data" / "mtd")
    trees.deeppcb(base / "data" / "deeppcb")
    published_trees.write("mvtec_ad2", base / "data" / "mvtec_ad2")
    trees.imagenet(base / "data" / "tiny", "folder")
    trees.good_and_bad(base / "pics")
    shutil.copytree(base / "pics" / "bad", base / "pics" / "new")
    (base / "data" / "weights").mkdir()
    np.savez(
        base / "data" / "weights" / "resnet18_in1k_folded_l1l3_fp16.npz",
        **fold(torch_names(stages=3)),
    )
    return base


def test_the_two_setup_commands_are_documented():
    assert set(ALL) >= SETUP


RUNNABLE = [block for block in BLOCKS if not set(commands(block)) <= SETUP]


def case(block: str):
    """The long blocks, all results and the benchmarks, are left to the slow run."""
    long = (
        "runs/ds2-mtd", "runs/corrupt-bottle", "runs/simsiam-0", "bottle-patchcore",
        "runs/mae-bottle", "runs/adpretrain-0", "runs/pcb-windows", "runs/mtd-5shot",
        "config.shots", "dsad bench",
        "dsad plan", "models/ad2", "runs/pixpro", "runs/pics", "runs/good-bad",
        "check-data --config.data.name=mvtec", "dsad export",
    )  # fmt: skip
    marks = [pytest.mark.slow] if any(part in block for part in long) else []
    return pytest.param(block, marks=marks, id=commands(block)[0][:60])


@pytest.mark.parametrize("block", [case(block) for block in RUNNABLE])
def test_block(block, folder):
    """A block's commands in order, as they build on each other."""
    every = commands(block)
    needed = f"run:{BASE.partition('=')[2]} " in block and BASE not in block.split()
    if needed and not (folder / "runs" / "mine").exists():
        every = [next(c for c in ALL if BASE in c.split()), *every]
    for line in every:
        words = shlex.split(line)
        assert words[0] in ("dsad", "python"), f"no test knows how to run {line!r}"
        rest = words[words.index("--") + 1 :] if "--" in words else words[1:]
        if words[0] == "dsad":
            done = command(*rest, *shortened(rest), cwd=folder)
        else:
            done = subprocess.run(
                [sys.executable, *words[1 : words.index("--") + 1], *rest, *shortened(rest)],
                cwd=folder, env=alone(), capture_output=True, text=True,
            )  # fmt: skip
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        for flag in rest:
            if flag.startswith(("--workdir=", "--out=")):
                assert any((folder / flag.partition("=")[2]).iterdir())


def test_numbers_name_their_command():
    """Each results table is preceded by a command block in its section."""
    for section in re.split(r"^## ", TEXT, flags=re.M):
        if re.search(r"\|\s*0?\.\d\d", section):
            assert "```bash" in section, section.splitlines()[0]


def test_python_blocks_run():
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.S)
    assert blocks
    for block in blocks:
        modules = re.findall(r"^\s*(?:import|from) (\S+)", block, re.M)
        assert set(modules) <= {"dsad", "numpy"}, "the README's Python uses nothing deeper"
        exec(compile(block, "README.md", "exec"), {})
