"""What a cell has that the nearest cell of another normal image has not: residual features."""

import jax.numpy as jnp
import numpy as np

from dsad.core import hosts
from dsad.models.wrappers import Kind


class Away:
    """Cells minus the nearest row of the support set, without the rows of the image itself."""

    def adapt(self, source, *, mesh, key):
        rows, owners = {}, []
        for batch in source:
            valid = np.asarray(batch.valid)
            for name, values in batch.maps.items():
                values = np.asarray(hosts.whole(values))[valid]
                rows.setdefault(name, []).append(values.reshape(-1, values.shape[-1]))
            cells = values.shape[1] * values.shape[2]
            owners.append(np.repeat(np.asarray(batch.index)[valid], cells))
        bank = {name: np.concatenate(parts) for name, parts in rows.items()}
        return {"rows": bank, "owner": np.concatenate(owners).astype(np.int32)}

    def transform(self, bank, maps, *, index, mesh=None):
        def residual(values, rows):
            gaps = values[:, :, :, None] - rows[None, None, None]
            squares = jnp.sum(gaps * gaps, axis=-1)
            same = bank["owner"][None, :] == index[:, None]
            nearest = jnp.argmin(jnp.where(same[:, None, None], jnp.inf, squares), axis=-1)
            return values - rows[nearest]

        return {name: residual(values, bank["rows"][name]) for name, values in maps.items()}


KIND = Kind("away", "away", "", Away)
