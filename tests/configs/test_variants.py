"""The words after a config's colon, and a run of seconds of every shipped config."""

import json

import jax
import ml_collections
import pytest

from dsad.assembly import evaluate
from dsad.assembly.configs import apply_variants
from dsad.cli import main
from dsad.core.errors import ConfigError
from dsad.terminal import flags

VARIANTS = {
    "first": lambda config: config.update(order=(*config.order, 1)),
    "second": lambda config: config.update(order=(*config.order, 2)),
}


def applied(words, others=None):
    config = ml_collections.ConfigDict({"order": ()}).lock()
    assert apply_variants(config, words, VARIANTS, "/somewhere/mine/new.py", others) is config
    return config.order


@pytest.mark.parametrize(
    ("words", "order"),
    [("", ()), (",", ()), ("second", (2,)), ("first,second", (1, 2)), ("second, first", (1, 2)),
     ("first,first", (1,))],
)  # fmt: skip
def test_variants_are_applied_in_their_own_order(words, order):
    assert applied(words) == order


def test_other_words_are_refused_with_what_exists():
    with pytest.raises(ConfigError) as error:
        applied("first,secnd")
    assert str(error.value) == (
        "mine/new.py has no variant 'secnd'. Did you mean 'second'? It has: first, second."
    )


def test_other_words_may_have_a_meaning_and_come_before_the_variants():
    def others(config, words):
        assert config.order == ()
        config.order = tuple(words)

    assert applied("b,second,a,first", others) == ("b", "a", 1, 2)
    assert applied("first", others) == (1,)


FOLDER = flags.config_directory()
NAMES = [
    n for n in flags.shipped_configs() if "def get_config(" in (FOLDER / f"{n}.py").read_text()
]


def loaded(name, words):
    config, _, _ = flags.Command("x", "", config=f"{name}:{words}").parse([])
    return config


@pytest.mark.parametrize("name", NAMES)
def test_every_config_has_a_small_size_and_says_what_else_there_is(name):
    config = loaded(name, "smoke")
    own = {"demo": lambda: [config.pretrain.data], "compare": lambda: config.datasets.values()}
    for data in own.get(name, lambda: [config.data])():
        assert data.name == "synthetic"
        assert data.synthetic.size <= 64
    if name not in ("mae", "isstad", "cutpaste"):  # where other words are categories
        with pytest.raises(ConfigError, match=rf"configs/{name}.py has no variant 'smok'.*'smoke'"):
            loaded(name, "smok")


@pytest.mark.parametrize("name", ["rad", "subspace"])
def test_published_variants_take_the_map_of_the_code(name):
    _, detector = evaluate.parse(loaded(name, "published"))
    traits = detector.traits
    assert detector.config.map_rule == "published"
    assert (traits.sigma, traits.image_score, detector.config.tail) == (0, "method", 0.01)


def test_published_scores_of_clip_are_by_cosines_of_class_tokens():
    """MuSc's code takes products of class tokens as they are of DINO alone."""
    _, detector = evaluate.parse(loaded("musc", "published"))
    assert (detector.config.scaled, detector.config.raw_vectors) == (True, False)


#: In the default run; other pretraining is in tests/cli/test_stages.py and the demo.
QUICK = ("data", "knn")
#: What a config begins with, by a flag that names it.
BEFORE = {
    "isstad": ("mae", "--config.init_from=runs/mae"),
    "isstad_detector": ("isstad", "--config.backbone=run:runs/isstad"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smoke")


@pytest.fixture(scope="module")
def quick():
    """One device and programs compiled without optimisation: compiling is all that takes long."""
    one = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *_: one)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


def run(name, folder):
    """The smoke run of a config, and before it the one that it begins with."""
    path, config = folder / "runs" / name, loaded(name, "smoke")
    if path.exists():
        return
    before, flag = BEFORE.get(name, (None, None))
    if before:
        run(before, folder)
    argv = [f"--config={name}:smoke", f"--workdir=runs/{name}", *filter(None, [flag])]
    if name == "data":
        assert main.main(["check-data", argv[0]]) == 0
    elif name == "compare":
        assert main.main(["compare", *argv]) == 0
        assert main.main(["report", f"runs/{name}"]) == 0
        assert json.loads((path / "comparison.json").read_text())["complete"]
        assert (path / "report.html").stat().st_size < 200_000
    elif "objective" in config:
        assert main.main(["pretrain", *argv]) == 0
        assert (path / "checkpoints" / "4").is_dir()
    else:
        assert main.main(["evaluate", *argv]) == 0
        mean = json.loads((path / "results.json").read_text())["mean"]
        assert 0 <= mean["linear_top1" if name == "probe" else "pixel_auroc"] <= 1


@pytest.mark.parametrize(
    "name",
    [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n != "demo"],
)
def test_every_smoke_runs(name, quick, folder, monkeypatch):
    """The demo has a test of its own."""
    monkeypatch.chdir(folder)
    run(name, folder)
