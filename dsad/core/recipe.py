"""How something is trained, as plain settings."""

from typing import Literal

from dsad.core.config import Refused, Settings, field
from dsad.core.tree import check_pattern

#: A pattern of parameters' paths, factors on their rate and decay, and whether they follow the
#: schedule; without it their rate is the peak times the factor in every step.
Group = tuple[str, float, float, bool]


class OptimConfig(Settings, place="optim"):
    """Optimiser and schedule; lengths are in epochs. The defaults are no method's own.

    Attributes:
      name: the optimiser; "stableadamw" is AdamW with AMSGrad and updates of bounded size, see
        ``train.optim.scale_by_stable_adam``.
      lr: peak learning rate for ``lr_batch`` images; scaled in proportion to the batch size.
      lr_batch: 0 leaves ``lr`` as it is.
      momentum: of LARS and SGD; of both AdamWs the decay of the first moment.
      b2: decay of the second moment of both AdamWs.
      weight_decay: of all parameters that are not ``exempt``.
      trust: LARS trust coefficient.
      clip: gradients whose norm over all parameters is larger are scaled down to it; 0: never.
      exempt: parameters whose path matches get neither weight decay nor trust ratio. By path, not
        by axes: the norm scales of stacked blocks have two axes, class and mask tokens have one.
      groups: parameters with a rate and decay of their own, see ``Group``; the first match wins.
      schedule: of the rate after the warm-up.
      warmup_epochs: length of the linear rise to ``lr``.
      warmup_multiplier: the warm-up starts at the peak divided by this; 0: at rate 0.
      milestones: epochs at which schedule "step" multiplies the rate by ``gamma``.
      gamma: factor at every milestone.
      min_lr: end of schedule "cosine", and floor of schedule "periodic".
      period_epochs: schedule "periodic" falls along half a cosine for so many epochs, then rises
        for as many, and so on; the rate changes between whole epochs only (torch's
        CosineAnnealingLR, stepped once an epoch).
      hold_epochs: schedule "cosine" then keeps its rate for so many epochs at a time, and its
        cosine begins with the run, not behind the warm-up, which ends on it; 0: it falls in every
        step (CFLOW's published code holds it for 8).
      published_schedule: as the published DS2 code runs: each warm-up step is counted twice, so the
        peak stays below ``lr`` and every milestone comes half a warm-up early, and an epoch has
        whole steps only, the rest of the images being dropped from the count.

    """

    name: Literal["lars", "sgd", "adamw", "stableadamw"] = "adamw"
    lr: float = field(1e-3, above=0)
    lr_batch: int = field(0, at_least=0)
    momentum: float = field(0.9, at_least=0, below=1)
    b2: float = field(0.999, at_least=0, below=1)
    weight_decay: float = field(0.0, at_least=0)
    trust: float = field(0.001, above=0)
    clip: float = field(0.0, at_least=0)
    exempt: str = r"(bias|scale|gamma)$"
    groups: tuple[Group, ...] = ()
    schedule: Literal["step", "cosine", "periodic", "constant"] = "constant"
    warmup_epochs: float = field(0.0, at_least=0)
    warmup_multiplier: float = field(0.0, at_least=0)
    milestones: tuple[float, ...] = field((), rising=True)
    gamma: float = field(0.1, above=0)
    min_lr: float = field(0.0, at_least=0)
    period_epochs: float = field(30.0, above=0)
    hold_epochs: float = field(0.0, at_least=0)
    published_schedule: bool = False

    def check(self) -> None:
        check_pattern("exempt", self.exempt)
        if self.published_schedule and self.schedule != "step":
            expected = f"False with optim.schedule={self.schedule!r}"
            advice = (
                "The published counting goes with schedule 'step' alone: set optim.schedule='step' "
                "or optim.published_schedule=False; a variant may have set either."
            )
            raise Refused("published_schedule", expected, True, advice)
        if self.hold_epochs and self.schedule != "cosine":
            raise Refused("hold_epochs", "0 without schedule cosine", self.hold_epochs)
        for i, (pattern, *factors, _) in enumerate(self.groups):
            check_pattern(f"groups[{i}][0]", pattern)
            if min(factors) < 0:
                raise Refused(f"groups[{i}]", "factors >= 0 on rate and decay", factors)


class Recipe(Settings, place="detector.recipe"):
    """How a detector trains, with its optimiser; a method's defaults are in its config.

    All batches are whole: where an epoch ends within one, the next begins there.

    Attributes:
      epochs: length of the training in passes over the images, unless ``steps`` is set.
      steps: length of the training in updates; 0: ``epochs`` sets it.
      batch_size: images per update.

    """

    epochs: float = field(20.0, above=0)
    steps: int = field(0, at_least=0)
    batch_size: int = field(8, at_least=1)
    optim: OptimConfig = OptimConfig()

    def check(self) -> None:
        if self.optim.schedule == "periodic":
            raise Refused("optim.schedule", "another, which categories can share", "periodic")
