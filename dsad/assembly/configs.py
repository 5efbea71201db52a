"""What config files share: the words after their colon, and sizes for a run of seconds."""

import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dsad.core.config import listed, suggestion
from dsad.core.errors import ConfigError

#: Changes a config in place.
Variant = Callable[[Any], None]


def apply_variants(
    config: Any,
    words: str,
    variants: Mapping[str, Variant],
    file: str,
    others: Callable[[Any, list[str]], None] | None = None,
) -> Any:
    """The config, changed by the words of ``--config=FILE:WORD,WORD``.

    Args:
      config: what the file has without variants.
      words: the text after the colon.
      variants: by name; applied in this order, whatever that of the words.
      file: ``__file__`` of the config file, for messages.
      others: changes the config by the words that are no variants, before the variants do.

    Raises:
      ConfigError: for such words without ``others``.

    """
    chosen = [word.strip() for word in words.split(",") if word.strip()]
    rest = [word for word in chosen if word not in variants]
    if others:
        others(config, rest)
    elif rest:
        raise unknown_word(file, rest[0], variants)
    for name, change in variants.items():
        if name in chosen:
            change(config)
    return config


def unknown_word(file: str, word: str, known: Iterable[str], kind: str = "variant") -> ConfigError:
    """The error for a word after the colon that the config file does not know."""
    path, known = pathlib.Path(file), tuple(known)
    return ConfigError(
        f"{path.parent.name}/{path.name} has no {kind} {word!r}.{suggestion(word, known)} "
        f"It has: {listed(known)}."
    )


def smoke_training(config: Any) -> None:
    """Four steps on a few small synthetic images; the network's size is left to the method."""
    config.data.name = "synthetic"
    config.data.synthetic.update(size=64, train=8)
    config.data.canvas = 64
    config.batch_size = 8
    config.steps = 4
    config.log_every = 1
    config.pictures = 0


def smoke_evaluation(config: Any) -> None:
    """A few small synthetic images of one category, for a random network."""
    config.weights = "random"
    config.data.name = "synthetic"
    config.data.categories = ("tiles",)
    config.data.synthetic.update(size=64, train=4, good=2, bad=1)
    config.evaluation.image_size = 64
    config.evaluation.batch_size = 8


def mvtec_ad2_evaluation(config: Any) -> None:
    """MVTec AD 2's protocol: thresholds from its validation images, F1 at those of three rules.

    Of an object there are 19 to 48 such images: no less than 0.05 has a bound with the fewest.
    """
    config.data.name = "mvtec_ad2"
    config.evaluation.false_alarm_rate = 0.05
    config.evaluation.decisions = ("bound", "sigma", "superadd")


def imagenet_training(config: Any) -> None:
    """ImageNet at up to 512 pixels, as most of its files are; torch's SGD decays everything."""
    config.data.name = "imagenet"
    config.data.canvas = 512
    config.data.cache = "none"  # 252 GB of canvases
    # A handful of ImageNet's files are CMYK, and a mislabelled one may have transparency.
    config.data.lossy = ("CMYK", "RGBA")
    config.batch_size = 256
    config.optim.update(
        name="sgd", lr_batch=256, momentum=0.9, weight_decay=1e-4, exempt="$^", schedule="cosine"
    )
    config.checkpoint.every = 5000


def small_training(config: Any) -> None:
    """ResNet-18 and views of 48 pixels of images of 64: minutes on a laptop.

    Adam, because rates of SGD that long runs take hardly move a network in so few steps.
    """
    config.objective.arch = "resnet18"
    config.data.canvas = 64
    config.data.cache = "device"
    config.batch_size = 32
    config.steps = 250
    config.optim.update(
        name="adamw", lr=1e-3, lr_batch=0, weight_decay=0.0, schedule="cosine", groups=(),
        warmup_epochs=0.0,
    )  # fmt: skip
    config.log_every = 10
    config.checkpoint.every = 50


def small_spd(config: Any, side: int) -> None:
    """SPD's views of ``side`` pixels, with CutPaste's pieces: SPD's own have 4 pixels of 48."""
    config.objective.spd.triplet.view.side = side
    config.objective.spd.triplet.blend.area = (0.02, 0.15)
