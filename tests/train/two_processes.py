"""One of several processes that take one step together: PORT COUNT INDEX FILE OBJECTIVE..."""

import sys

import jax
import numpy as np

from dsad.core import distributed
from dsad.core.mesh import MeshConfig, make_mesh


def main(port, count, index, file, *names):
    distributed.start(
        coordinator=f"localhost:{port}", num_processes=int(count), process_id=int(index)
    )
    from tests.contracts.objectives.common import BATCH
    from tests.train.equality import one_step

    assert jax.process_count() == int(count)
    mesh, part = make_mesh(MeshConfig(fsdp=2)), BATCH // int(count)
    rows = slice(int(index) * part, (int(index) + 1) * part)
    for name in names:
        found = one_step(name, mesh, rows=rows)
        if index == "0":
            # Whole field names in front, because paths hold slashes as well.
            arrays = {f"{field} {path}": x
                      for field in ("grads", "extra", "choices")
                      for path, x in getattr(found, field).items()}  # fmt: skip
            np.savez(f"{file}-{name}.npz", loss=found.loss, **arrays)


if __name__ == "__main__":
    main(*sys.argv[1:])
