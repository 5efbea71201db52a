"""The demo: segmentation of corruptions, then localization before and after. No file needed.

dsad demo                 three and a half minutes on two CPU cores
dsad demo --config=configs/demo.py:smoke --workdir=smoke      seconds, for tests
"""

import ml_collections

from dsad.assembly import evaluate, pretrain
from dsad.assembly.configs import apply_variants


def get_config(variants: str = ""):
    train = pretrain.default_config("corrupt")
    train.data.name = "synthetic"
    train.data.canvas = 128
    train.data.synthetic.train = 32
    train.batch_size = 8
    train.steps = 1200
    train.log_every = 20
    train.optim.update(name="adamw", lr=3e-3, schedule="cosine")
    # Cells of 4 and 8 pixels, as the nearest neighbours below compare them, and views and shapes of
    # about the size that they have in the test images.
    train.objective.layers = ("layer1", "layer2")
    train.objective.view.area = (0.4, 0.8)
    train.objective.shapes.update(
        rectangle=(4.0, 16.0), scar_width=(1.5, 4.0), scar_length=(8.0, 40.0), blob=(2.0, 9.0),
        colour=0.1,
    )  # fmt: skip
    test = evaluate.default_config("knn")
    test.evaluation.image_size = 128
    test.evaluation.false_alarm_rate = 0.06  # what half of 32 images allow
    test.detector.layers = ("layer1", "layer2")
    config = ml_collections.ConfigDict({"pretrain": train, "evaluate": test}).lock()
    return apply_variants(config, variants, {"smoke": _smoke}, __file__)


def _smoke(config):
    train = config.pretrain
    train.data.synthetic.update(size=48, train=4, good=2, bad=1)
    train.data.canvas = 48
    train.batch_size, train.steps, train.log_every = 8, 3, 1
    train.objective.width = 8
    train.objective.view.side = 48
    config.evaluate.evaluation.image_size = 48
