"""What every backbone has beside its maps, for the small ones that tests make."""

import dataclasses
import functools

#: A field that is part of the tree's structure where a subclass is registered as a pytree.
static = functools.partial(dataclasses.field, metadata={"static": True}, kw_only=True)


@dataclasses.dataclass(frozen=True)
class Plain:
    """A backbone whose subclass gives all its ``maps`` of images."""

    mean: tuple[float, float, float] = static(default=(0.5, 0.5, 0.5))
    std: tuple[float, float, float] = static(default=(0.25, 0.25, 0.25))
    arch: str = static(default="plain")
    description: str = static(default="none")
    image_size: int | None = static(default=None)
    layers: tuple[str, ...] | None = static(default=None)

    def only(self, layers):
        return dataclasses.replace(self, layers=tuple(layers))

    def __call__(self, images):
        maps = self.maps(images)
        return maps if self.layers is None else {n: maps[n] for n in self.layers}
