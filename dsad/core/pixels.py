"""Statistics of pixels that networks are trained with."""

#: Mean and standard deviation of ImageNet's RGB pixels in [0, 1], by which nearly all published
#: networks normalise.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
