"""Similarities between feature vectors, and monitors of how much of the space they use."""

import jax
import jax.numpy as jnp


def unit(x: jax.Array, epsilon: float = 1e-12) -> jax.Array:
    """Divide the last axis by its Euclidean norm, at least ``epsilon``."""
    squared = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    # max inside the root: the gradient at an exact zero vector stays finite.
    return x / jnp.sqrt(jnp.maximum(squared, epsilon**2))


def self_attention(z: jax.Array, values: jax.Array, power: float = 2.0) -> jax.Array:
    """PixPro's propagation: y_i = Σ_j max(cos(z_i, z_j), 0)^power · values_j.

    z and values (b, n, c); no softmax and no division by the sum of weights (Xie et al. 2021,
    eq. 3). Below exponent 1 the base gets 1e-6, because its slope at 0 is infinite.
    """
    u = unit(z)
    weights = jnp.maximum(jnp.einsum("bic,bjc->bij", u, u, precision="highest"), 0.0)
    weights = (weights + 1e-6) ** power if power < 1 else weights**power
    return jnp.einsum("bij,bjc->bic", weights, values, precision="highest")


def feature_std(x: jax.Array) -> jax.Array:
    """Spread of unit vectors (n, c): mean per-channel standard deviation × √c.

    1 for vectors spread over the whole sphere, 0 after a collapse to one point (SimSiam, Chen
    and He 2021, fig. 2).
    """
    u = unit(x.astype(jnp.float32))
    return jnp.mean(jnp.std(u, axis=0)) * jnp.sqrt(jnp.float32(x.shape[-1]))


def effective_rank(x: jax.Array) -> jax.Array:
    """Participation ratio (Σλ)² / Σλ² of the covariance eigenvalues of unit vectors (n, c).

    Between 1 (all variance along one direction) and c. Chosen over the entropy form because it
    needs no eigenvalues: tr(C)² / ‖C‖², one matrix product.
    """
    u = unit(x.astype(jnp.float32))
    u = u - jnp.mean(u, axis=0, keepdims=True)
    covariance = jnp.einsum("ni,nj->ij", u, u)
    total = jnp.trace(covariance)
    return jnp.square(total) / jnp.maximum(jnp.sum(jnp.square(covariance)), 1e-30)
