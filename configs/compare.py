"""A comparison: detectors × backbones × data sets × seeds in one table with paired differences.

    dsad compare --config.backbones.before=run:runs/mine@0 \
        --config.backbones.trained=run:runs/mine --workdir=runs/compare
    dsad report runs/compare

By default a pretraining run against its start, on its own data. Other comparisons are files of
their own, with as many rows as wanted:

    from dsad.assembly import comparison

    def get_config(variants=""):
        config = comparison.default_config()
        config.detectors = ("patchcore", "padim", "knn")
        config.settings = {"knn": {"detector": {"bank_rows": 16000}}}
        config.backbones = comparison.in_order({
            "random": comparison.backbone("resnet18", "random:{seed}"),
            "imagenet": comparison.backbone("resnet18", "imagenet"),
            "spd": comparison.backbone("run:runs/simsiam-spd-{seed}"),
        })
        config.datasets = comparison.in_order({
            "bottle": comparison.dataset("mvtec", root="data/mvtec/bottle256"),
            "mtd": comparison.dataset("mtd:grouped", root="data/mtd"),
        })
        config.seeds = (0, 1, 2)
        config.baseline = "random"
        return config.lock()

Several numbers of shots stand side by side: --config.shots="(1, 2, 4, 0)", 0 for all. The licences
of weights are told where their source is known; of a file name it (licence="BSD-3-Clause").
With "{seed}" each seed has a network of its own, and differences pair the seeds. A table's rows
are in the order of the entries, or by name where in_order is left out.

Variants, after a colon and joined by commas:
    adpretrain raw, residual and projected maps of the encoder of runs/adpretrain-0, projectors of
               runs/adpretrain-0 to -2, on bottles, toothbrushes and cookies; layers
               other than the detectors' own by --config.backbones.raw.layers and so on
    mobilenetv2 behind adpretrain: likewise of runs/adpretrain-mobilenetv2-0 to -2
    trained    behind adpretrain: detectors that train, shortened for two cores, on bottles, seed 0;
               GLASS, the slowest, by --config.detectors=glass --config.evaluation.image_size=96
    imagenet   ResNet-18 with ImageNet's weights against random ones of three seeds, on MVTec AD
               (--config.datasets.mvtec.root=MVTEC); not run as it is
    representations
               seven encoders, four of them of own runs (ds2-0 to -2, corrupt-bottle-0 to -2,
               simsiam-spd-0, mae-bottle), with 1, 2, 4 and all images of bottles, toothbrushes
               and cookies, seeds 0 to 2; two hours on two cores, see README
    smoke      two detectors on two random networks and two seeds, in seconds
"""

import functools

from dsad.assembly import comparison
from dsad.assembly.configs import apply_variants


def get_config(variants: str = ""):
    config = comparison.default_config()
    config.detectors = ("patchcore", "padim")
    rows = {"before": "run:runs/mine@0", "trained": "run:runs/mine"}
    config.backbones = comparison.in_order(rows)
    config.datasets = {"own": comparison.dataset("run")}
    return apply_variants(config, variants, VARIANTS, __file__)


def _wrapped(config, runs):
    encoder = f"run:{runs}-0"
    rows = {
        "raw": encoder,
        "residual": f"residual:{encoder}",
        "projected": f"projected:{runs}-{{seed}}:{encoder}",
    }
    rows = {name: comparison.backbone(spec) for name, spec in rows.items()}
    config.backbones = comparison.in_order(rows)


def _adpretrain(config):
    config.detectors = ("patchcore", "padim", "featurenorm")
    _wrapped(config, "runs/adpretrain")
    _products(config)


def _products(config):
    mvtec = functools.partial(comparison.dataset, "mvtec")
    sets = {
        "bottle": mvtec(root="data/mvtec", categories=("bottle256",)),
        "toothbrush": mvtec(root="data/mvtec", categories=("toothbrush_reheld256",)),
        "cookie": mvtec(
            root="data/lookout", categories=("cookie_288x384",), missing_masks="image_only"
        ),
    }
    config.datasets = comparison.in_order(sets)
    config.seeds = (0, 1, 2)


def _mobilenetv2(config):
    _wrapped(config, "runs/adpretrain-mobilenetv2")


def _trained(config):
    config.detectors = ("simplenet", "cflow:small", "uniad:small")
    config.settings = {
        "glass": {"detector": {"hidden": 512, "recipe": {"steps": 500}}},
        "simplenet": {"detector": {"hidden": 512, "recipe": {"steps": 300}}},
    }
    config.datasets = comparison.in_order({"bottle": config.datasets.bottle})
    config.seeds = (0,)


def _imagenet(config):
    rows = {
        "random": comparison.backbone("resnet18", "random:{seed}"),
        "imagenet": comparison.backbone("resnet18", "imagenet"),
    }
    config.backbones = comparison.in_order(rows)
    config.datasets = {"mvtec": comparison.dataset("mvtec")}
    config.seeds = (0, 1, 2)


def _representations(config):
    config.detectors = ("knn", "patchcore", "padim", "subspace", "anomalydino", "rad", "musc")
    row, files = comparison.backbone, "data/weights"
    rows = {
        "resnet18": row(
            "resnet18", f"{files}/resnet18_in1k_folded_l1l3_fp16.npz", licence="BSD-3-Clause"
        ),
        "mobilenetv2": row(
            "mobilenet_v2", f"{files}/mobilenetv2_in1k_int8.npz", licence="Apache-2.0"
        ),
        "squeezenet": row("squeezenet1_1", f"{files}/squeezenet11_in1k_notop.npz", licence="MIT"),
        "ds2": row("run:runs/ds2-{seed}"),
        "corrupt": row("run:runs/corrupt-bottle-{seed}"),
        "spd": row("run:runs/simsiam-spd-0"),
        "mae": row("run:runs/mae-bottle", layers=("block3", "block7")),
    }
    config.backbones = comparison.in_order(rows)
    norms = {"detector": {"layers": ("norm3", "norm7", "norm11")}}
    settings = {
        "knn": {"detector": {"bank_rows": 16000}},
        # Maps of equal shape are averaged: of a convolutional network a single one.
        "subspace": {"detector": {"layers": ("layer3",)}},
        "musc": {"detector": {"layers": ("layer2", "layer3"), "similar": "mean"}},
        **{f"mae/{name}": norms for name in ("anomalydino", "rad")},
        "mae/subspace": {"detector": {"layers": ("block3", "block7")}},
        "mae/musc": {"detector": {"layers": ("block3", "block7")}},
    }
    config.settings = settings
    # Of a single image there are no Gaussians; without a final norm neither of the two is meant.
    cnns = [name for name in rows if name != "mae"]
    config.skip = (
        "*/1-shot/padim", *(f"*/{name}/{own}" for name in cnns for own in ("anomalydino", "rad")),
    )  # fmt: skip
    _products(config)
    config.shots = (1, 2, 4, 0)


def _smoke(config):
    config.detectors = ("knn", "padim")
    config.settings = {"padim": {"detector": {"channels": 8}}}
    rows = {
        "resnet18": comparison.backbone("resnet18", "random:{seed}"),
        "patches": comparison.backbone("patches:32/16:resnet18", "random"),
    }
    config.backbones = comparison.in_order(rows)
    config.datasets = {"tiles": comparison.dataset("synthetic", categories=("tiles",))}
    config.datasets.tiles.synthetic.update(size=64, train=4, good=2, bad=1)
    config.seeds = (0, 1)
    config.evaluation.update(image_size=64, batch_size=8)


VARIANTS = {
    "adpretrain": _adpretrain, "mobilenetv2": _mobilenetv2, "trained": _trained,
    "imagenet": _imagenet, "representations": _representations, "smoke": _smoke,
}  # fmt: skip
