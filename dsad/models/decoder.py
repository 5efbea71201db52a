"""The decoder of masked autoencoders: a narrow transformer from tokens to pixels (He et al. 2022).

ISSTAD's second stage uses the same parts with more blocks and a class head.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from dsad.core.config import Refused, Settings, field
from dsad.models import positions, transformer
from dsad.models.draws import Draws, normal, uniform_draws
from dsad.models.transformer import BlockSpec, Remat


class DecoderConfig(Settings, place="decoder"):
    """Size of a decoder.

    Attributes:
      width: channels of a token.
      depth: number of blocks.
      heads: attention heads of a block.

    """

    width: int = field(512, at_least=1)
    depth: int = field(8, at_least=1)
    heads: int = field(16, at_least=1)

    def check(self) -> None:
        if self.width % 4 or self.width % self.heads:
            raise Refused("width", f"a number that 4 and the {self.heads} heads divide", self.width)


def patchify(images: jax.Array, patch: int) -> jax.Array:
    """Images (b, H, W, c) as patches (b, n, patch² · c), row by row.

    Within a patch the channel runs fastest, then the column, then the row.
    """
    b, height, width, c = images.shape
    x = images.reshape(b, height // patch, patch, width // patch, patch, c)
    return jnp.swapaxes(x, 2, 3).reshape(b, -1, patch * patch * c)


def unpatchify(patches: jax.Array, patch: int, grid: tuple[int, int]) -> jax.Array:
    """The inverse of ``patchify``: patches (b, rows · columns, patch² · c) to (b, H, W, c)."""
    b, rows, columns = patches.shape[0], *grid
    x = patches.reshape(b, rows, columns, patch, patch, -1)
    return jnp.swapaxes(x, 2, 3).reshape(b, rows * patch, columns * patch, -1)


class Decoder:
    """Pure functions of a decoder for an encoder of ``source`` channels and one class token.

    The position table is fixed, made for ``grid`` × ``grid`` patches, and lies in ``extra``. With
    ``masked`` False there is no mask token: nothing is hidden.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        *,
        source: int,
        patch: int,
        grid: int,
        masked: bool = True,
        dtype: Any = jnp.float32,
        remat: Remat = "none",
    ) -> None:
        self.cfg, self.source, self.patch, self.grid = cfg, source, patch, grid
        self.masked, self.dtype = masked, jnp.dtype(dtype)
        self.remat: Remat = remat
        self.blocks = BlockSpec(width=cfg.width, depth=cfg.depth, heads=cfg.heads)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """Fresh (params, extra) by MAE's rules."""
        table = positions.sincos_table(self.cfg.width, (self.grid, self.grid))
        return uniform_draws(key, self._fresh), {"pos": jnp.asarray(table)}

    def _fresh(self, draws: Draws) -> Any:
        d = self.cfg.width
        params = {
            "embed": transformer.linear_params(draws, self.source, d),
            "blocks": transformer.init_blocks(draws, self.blocks),
            "norm": transformer.norm_params(d),
            "head": transformer.linear_params(draws, d, 3 * self.patch**2),
        }
        if self.masked:
            params["mask_token"] = 0.02 * normal(draws.take((d,)))
        return params

    @functools.cache  # noqa: B019 - networks are few and live as long as the program
    def shapes(self) -> tuple[Any, Any]:
        """(params, extra) as nested dicts of ``ShapeDtypeStruct``."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def embed(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Encoder tokens (b, n, source) as decoder tokens (b, n, d), without positions."""
        return transformer.linear(params["embed"], tokens.astype(self.dtype))

    def placed(self, extra: Any, tokens: jax.Array, grid: tuple[int, int]) -> jax.Array:
        """Class token and all patches (b, 1 + cells, d) with their positions added."""
        own = (self.grid, self.grid)
        table = positions.resample_table(extra["pos"], own, grid, 1, "plain")
        return tokens + table.astype(tokens.dtype)[None]

    def run(self, params: Any, x: jax.Array, each: Any = None) -> tuple[jax.Array, Any]:
        """The blocks on placed tokens; see ``transformer.scan_blocks`` for ``each``."""
        return transformer.scan_blocks(
            params["blocks"], x, self.blocks, remat=self.remat, each=each
        )

    def pixels(self, params: Any, x: jax.Array) -> jax.Array:
        """Predicted patches (b, cells, patch² · 3) f32 from the last block's output."""
        x = transformer.layer_norm(params["norm"], x[:, 1:], self.blocks.eps)
        return transformer.linear(params["head"], x).astype(jnp.float32)
