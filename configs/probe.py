"""Probes by labels: what a k-NN vote and a linear classifier make of a backbone's vectors.

    dsad evaluate --config=configs/probe.py --config.backbone=run:runs/mine --workdir=runs/probe
    dsad evaluate --config=configs/probe.py --config.backbone=resnet18 --config.weights=FILE.npz \
        --config.data.name=folder --config.data.root=PICTURES --config.seeds="(0, 1, 2)" \
        --workdir=runs/probe-imagenet
    dsad evaluate --config=configs/probe.py:imagenet --config.backbone=run:runs/mine \
        --config.data.root=IMAGENET/train --workdir=runs/probe-1k

A class is a category of the data: a folder for each (folder, imagenet), an object of MVTec, a scene
of the synthetic set; normal images alone take part. Images are encoded once, as the mean over the
cells of the deepest map, or of config.probe.layer ("cls": the class token of a vision transformer).
By default the data are those of the run. 10,000 pictures of 200 classes at 64 px with a ResNet-18,
three splits: one minute on two CPU cores, 22 s of it for the encoding.

Variants, after a colon and joined by commas:
    imagenet   ImageNet's training images, a tenth of each class for the test; not run with dsad
    smoke      a random network on a few small synthetic images, in seconds
"""

from dsad.assembly.configs import apply_variants, smoke_evaluation
from dsad.assembly.label_probe import default_config


def get_config(variants: str = ""):
    return apply_variants(default_config(), variants, VARIANTS, __file__)


def _imagenet(config):
    config.data.name = "imagenet"
    # A handful of ImageNet's files are CMYK, and a mislabelled one may have transparency.
    config.data.lossy = ("CMYK", "RGBA")
    config.probe.train_share = 0.9
    config.evaluation.batch_size = 256


def _smoke(config):
    smoke_evaluation(config)
    config.data.categories = ()
    config.data.synthetic.train = 8
    config.probe.k = 5


VARIANTS = {"imagenet": _imagenet, "smoke": _smoke}
