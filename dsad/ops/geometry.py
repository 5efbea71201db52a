"""Where the cells of two crops lie in the image they were cut from."""

import jax
import jax.numpy as jnp


def cell_centres(box: jax.Array, cells: int) -> tuple[jax.Array, jax.Array]:
    """Centres of the columns and rows of a grid over each box, (b, cells) each.

    ``box`` (b, 4) is x0, y0, x1, y1 in units of the image; x1 < x0 after a flip, so that column
    centres then run from right to left.
    """
    steps = (jnp.arange(cells, dtype=jnp.float32) + 0.5) / cells
    x = box[:, 0:1] + steps[None, :] * (box[:, 2:3] - box[:, 0:1])
    y = box[:, 1:2] + steps[None, :] * (box[:, 3:4] - box[:, 1:2])
    return x, y


def cell_diagonal(box: jax.Array, cells: int) -> jax.Array:
    """Diagonal of one cell of a grid over each box, (b,)."""
    return jnp.hypot(box[:, 2] - box[:, 0], box[:, 3] - box[:, 1]) / cells


def spatial_positives(
    query_box: jax.Array, key_box: jax.Array, cells: int, threshold: float
) -> jax.Array:
    """Pairs of cells whose centres lie close together, (b, cells², cells²) bool.

    Distance of the two centres over the larger of the two cell diagonals, strictly below
    ``threshold`` (PixPro, Xie et al. 2021, eq. 1; DS2 uses 0.1). Cells are flattened row-major.
    """
    squared, diagonal = _squared_distances(query_box, key_box, cells)
    close = squared < jnp.square(threshold * diagonal)[:, None, None, None, None]
    return close.reshape(close.shape[0], cells**2, cells**2)


def cell_distances(query_box: jax.Array, key_box: jax.Array, cells: int) -> jax.Array:
    """The distances that ``spatial_positives`` bounds, (b, cells², cells²) in cell diagonals."""
    squared, diagonal = _squared_distances(query_box, key_box, cells)
    distances = jnp.sqrt(squared) / diagonal[:, None, None, None, None]
    return distances.reshape(distances.shape[0], cells**2, cells**2)


def _squared_distances(
    query_box: jax.Array, key_box: jax.Array, cells: int
) -> tuple[jax.Array, jax.Array]:
    """Between centres, (b, row, column, row, column), and the larger of the diagonals (b,)."""
    qx, qy = cell_centres(query_box, cells)
    kx, ky = cell_centres(key_box, cells)
    dx = jnp.square(qx[:, :, None] - kx[:, None, :])  # (b, query column, key column)
    dy = jnp.square(qy[:, :, None] - ky[:, None, :])
    squared = dy[:, :, None, :, None] + dx[:, None, :, None, :]
    return squared, jnp.maximum(cell_diagonal(query_box, cells), cell_diagonal(key_box, cells))
