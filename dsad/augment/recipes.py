"""Views of whole-image methods as they were published, for ``ViewConfig`` fields of objectives.

Blurs are meant for views of 224 pixels and follow the side of others. Published codes cut the
kernel at a tenth of the side, these at four standard deviations.
"""

from dsad.augment.views import ViewConfig

#: MoCo v2 (Chen et al. 2020) and SimSiam (Chen and He, CVPR 2021), both views.
MOCO = ViewConfig(
    area=(0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grey_probability=0.2, blur_side=224,
    blur_probability=0.5,
)  # fmt: skip
#: SimCLR (Chen et al., ICML 2020), both views.
SIMCLR = ViewConfig(
    area=(0.08, 1.0), jitter=(0.8, 0.8, 0.8, 0.2), grey_probability=0.2, blur_side=224,
    blur_probability=0.5,
)  # fmt: skip
#: Training with labels: crop and flip.
SUPERVISED = ViewConfig(area=(0.08, 1.0), jitter_probability=0.0, blur_probability=0.0)
#: SPD's positives and negatives (Zou et al., ECCV 2022); strengths of a third-party code.
WEAK = ViewConfig(
    area=(0.9, 1.0), jitter=(0.1, 0.1, 0.1, 0.05), blur_sigma=(0.1, 0.3), blur_side=224,
    blur_probability=0.5,
)  # fmt: skip
