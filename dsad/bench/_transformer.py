"""What ``dsad bench step`` adds for transformers: masking, rematerialization, compile time."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from dsad.assembly.pretrain import Run
from dsad.bench import _measure
from dsad.core.types import RunInfo
from dsad.models.transformer import POLICIES
from dsad.objectives import mae
from dsad.terminal import console

#: Depth must not cost compilation: the deepest network is compared with the shallowest.
SIZES = ("mae_vit_tiny_patch16", "mae_vit_large_patch16")
_INFO = RunInfo(total_steps=1, batch_size=1, samples=1, classes=1)


def masking(
    out: Console, objective: mae.MAE, params: Any, extra: Any, views: Any, rounds: int
) -> float:
    """Encode the kept patches and all of them, forward and backward; prints and returns a ratio."""
    whole = mae.MAE(dataclasses.replace(objective.cfg, mask_ratio=0.0), _INFO)

    def call(made: mae.MAE) -> Any:
        def encode(encoder: Any) -> jax.Array:
            latent = made.encode({"encoder": encoder}, extra, views)[0]
            return jnp.mean(jnp.square(latent.astype(jnp.float32)))

        grad = jax.jit(jax.grad(encode))
        return lambda: grad(params["encoder"])

    found = _measure.interleaved({"kept": call(objective), "all": call(whole)}, rounds)
    kept, every = found["kept"].median, found["all"].median
    cells = objective.encoder.spec.grid**2
    out.print(
        f"encoder, forward and backward: {objective.keep} of {cells} patches {kept * 1e3:.1f} ms, "
        f"all patches {every * 1e3:.1f} ms: {every / kept:.2f} × faster per image at mask ratio "
        f"{objective.cfg.mask_ratio:g}"
    )
    return every / kept


def _compiled(objective: Any, *shapes: Any) -> tuple[jax.stages.Compiled, float]:
    """Loss and gradient for shapes of params, extra and views, and the seconds it took."""

    def loss(*arguments: Any) -> Any:
        return objective.loss(*arguments, key=jax.random.key(0), step=jnp.int32(0))

    start = time.perf_counter()
    made = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*shapes).compile()
    return made, time.perf_counter() - start


def memory(out: Console, run: Run, views: Any, weights: Any) -> dict[str, int]:
    """Temporary bytes of one device's loss and gradient for every remat policy, as compiled."""
    cfg = run.objective.cfg  # type: ignore[attr-defined]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (*weights, views))
    table = console.table("remat", "temporaries MiB", "compile s", whole=True)
    found = {}
    for policy in ("none", *POLICIES):
        made = type(run.objective)(dataclasses.replace(cfg, remat=policy), run.info)  # type: ignore[call-arg]
        compiled, seconds = _compiled(made, *shapes)
        size = compiled.memory_analysis()
        found[policy] = int(size.temp_size_in_bytes) if size is not None else 0
        table.add_row(policy, f"{found[policy] / 2**20:.1f}", f"{seconds:.1f}")
    out.print(table)
    return found


def compile_times(out: Console, batch: int = 8) -> dict[str, float]:
    """Seconds to lower and compile loss and gradient of ViT-Ti and ViT-L, without running them."""
    found = {}
    for arch in SIZES:
        cfg = mae.Config(encoder=mae.EncoderConfig(arch=arch))
        made = mae.MAE(cfg, _INFO)
        params, extra = jax.eval_shape(made.init, jax.random.key(0))
        cells, side = made.encoder.spec.grid**2, cfg.view.side
        views = {
            "image": jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32),
            "noise": jax.ShapeDtypeStruct((batch, cells), jnp.float32),
        }
        found[arch] = _compiled(made, params, extra, views)[1]
    tiny, large = (found[a] for a in SIZES)
    out.print(
        f"compiling loss and gradient, {batch} images of 224 px: ViT-Ti (12 blocks) {tiny:.1f} s, "
        f"ViT-L (24 blocks) {large:.1f} s: {large / tiny:.2f} ×"
    )
    return found
