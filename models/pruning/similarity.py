"""How alike experts are: cosines of what the router, the outputs or the weights say about them, and linear CKA.

Legend: E experts, S sampled tokens, D model width, F expert inner width, W = 3D (2D if not gated), N numbers that
describe an expert.
"""

import numpy as np
import numpy.typing as npt
import torch

from models.pruning.align import matching
from models.pruning.plan import FloatArray
from models.pruning.stats import Float32Array, Weights


def cosine(gram_EE: npt.ArrayLike) -> FloatArray:
    """Cosines from inner products, float64 [E, E]; a vector of length 0 is like itself alone."""
    gram = np.asarray(gram_EE, dtype=np.float64)
    norm_E = np.sqrt(np.maximum(gram.diagonal(), 0.0))
    norm_E = np.where(norm_E > 0, norm_E, 1.0)
    cosine_EE: FloatArray = np.clip(gram / np.outer(norm_E, norm_E), -1.0, 1.0)
    np.fill_diagonal(cosine_EE, 1.0)
    return cosine_EE


def inner_products(x_EN: npt.ArrayLike) -> FloatArray:
    """Inner products of rows, in float64: [E, N] -> [E, E]."""
    x = np.asarray(x_EN, dtype=np.float64)
    return np.asarray(x @ x.T)


def squared_distances(gram_EE: npt.ArrayLike) -> FloatArray:
    """Squared Euclidean distances from inner products; never below 0."""
    gram = np.asarray(gram_EE, dtype=np.float64)
    square_E = gram.diagonal()
    return np.asarray(np.maximum(square_E[:, None] + square_E[None, :] - 2 * gram, 0.0))


def output_gram(f_SED: Float32Array) -> FloatArray:
    """Inner products of the experts' outputs on all sampled tokens, each expert's laid end to end."""
    return inner_products(f_SED.transpose(1, 0, 2).reshape(f_SED.shape[1], -1))


def linear_cka(f_SED: Float32Array) -> FloatArray:
    """||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), X and Y two experts' outputs [S, D] centred over tokens.

    1 for a rotated and scaled copy; 0 for an expert whose output never changes. ||X^T Y||_F^2 is the inner product of
    X X^T and Y Y^T, so each expert is described once, by S * S numbers, whatever D is.
    """
    centred_ESD = f_SED.transpose(1, 0, 2).astype(np.float64)
    centred_ESD -= centred_ESD.mean(1, keepdims=True)
    token_ESS = centred_ESD @ centred_ESD.transpose(0, 2, 1)
    return cosine(inner_products(token_ESS.reshape(len(token_ESS), -1)))


def neurons(weights: Weights) -> Float32Array:
    """[E, F, W]: each neuron's gate row, up row and down column, end to end; no gate row where experts have none."""
    num_neurons = weights.w_out_EDF.shape[2]
    parts = [weights.w_in_EGD[:, i : i + num_neurons] for i in range(0, weights.w_in_EGD.shape[1], num_neurons)]
    return np.concatenate([*parts, weights.w_out_EDF.transpose(0, 2, 1)], axis=2)


def weight_gram(weights: Weights, reference: int | None = None) -> FloatArray:
    """Inner products of all weights of the experts, whose neurons are first permuted to fit the reference's, if any.

    Which place a neuron has means nothing; fitting all to one expert costs E assignments instead of one per pair, and
    still finds permuted copies equal, since they fit the reference in the same order.
    """
    neuron_EFW = neurons(weights)
    if reference is not None:
        w_in, w_out = torch.from_numpy(weights.w_in_EGD), torch.from_numpy(weights.w_out_EDF)
        for expert, neuron_FW in enumerate(neuron_EFW):
            neuron_FW[:] = neuron_FW[matching(w_in[expert], w_out[expert], w_in[reference], w_out[reference])]
    return inner_products(neuron_EFW.reshape(len(neuron_EFW), -1))
