"""DenseCL (Wang et al., CVPR 2021): ResNet-50 from scratch on the normal images of MVTec AD.

MoCo v2 whose loss is half that of whole images and half that of cells: a cell's positive is the
most similar one of the other view, by the encoder's features; negatives come from two queues. The
published settings: 200 epochs of 256 images, queues of 65,536. Here both views are queries and keys
by turns, where the published code has one of each.

    dsad pretrain --config=configs/densecl.py --config.data.root=MVTEC --workdir=runs/densecl

A step compares 12,544 cells with 65,536 keys in each direction: 3.3 GB of similarities, split over
the devices. Meant for accelerators, and not measured there; on a CPU begin with small. With
mtd and --config.steps=100 (6 minutes of processor time, x86, one run) nearest neighbours of layer2
and layer3 at 224 px, 16,000 bank rows, go from AUPRO 0.320 to 0.392 and from pixel AUROC 0.634 to
0.611 on the grouped split.

Variants, after a colon and joined by commas:
    small      ResNet-18, 96 px views, batches of 32, 24 epochs, queues of 1,024: a laptop's size
    mtd        magnetic tiles, grouped split, at the size of small
    synthetic  the procedural data set, needs no file
    smoke      a few steps on small synthetic images
"""

from dsad.assembly.configs import apply_variants, smoke_training
from dsad.assembly.pretrain import default_config


def get_config(variants: str = ""):
    config = default_config("ds2")
    config.data.name = "mvtec"
    config.data.canvas = 512
    config.batch_size = 256
    config.epochs = 200.0
    # SGD as torch has it: everything decays, norms and biases too.
    config.optim.update(
        name="sgd", lr=0.03, lr_batch=256, weight_decay=1e-4, exempt=r"$^", schedule="cosine"
    )
    config.objective.update(
        arch="resnet50", layers=("layer4",), hidden=2048, hidden_norm=False, out=128,
        threshold=0.0, top1="cell", top1_similarity="cosine", propagation=False,
        momentum=0.999, momentum_end=0.999, zero_init_last=False,
    )  # fmt: skip
    config.objective.negatives.update(source="queue", queue=65536, temperature=0.2, whole=0.5)
    _views(
        config, area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grey_probability=0.2,
        blur_probability=0.5,
    )  # fmt: skip
    return apply_variants(config, variants, VARIANTS, __file__)


def _views(config, **values):
    for view in (config.objective.view1, config.objective.view2):
        view.update(values)


def _small(config):
    config.data.canvas = 256
    config.batch_size = 32
    config.epochs = 24.0
    config.log_every = 5
    config.checkpoint.every = 100
    config.checkpoint.permanent = 100
    config.objective.update(arch="resnet18", hidden=512)
    # A teacher that far behind would hardly leave its start within some hundred steps.
    config.objective.update(momentum=0.99, momentum_end=0.99)
    config.objective.negatives.queue = 1024
    _views(config, side=96)


def _mtd(config):
    _small(config)
    config.data.name = "mtd:grouped"


def _synthetic(config):
    _small(config)
    config.data.name = "synthetic"
    config.data.canvas = 128
    _views(config, side=64)


def _smoke(config):
    _synthetic(config)
    smoke_training(config)
    config.objective.update(hidden=32, out=16)
    config.objective.negatives.queue = 32
    _views(config, side=32)


VARIANTS = {"small": _small, "mtd": _mtd, "synthetic": _synthetic, "smoke": _smoke}
