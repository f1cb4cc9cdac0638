"""Parameters of other code bases as a state dict of `mfengine.DiT`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mfengine.networks.base import Converted
from mfengine.ops import sinusoid


def from_jax(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameters of the MeanFlow paper's JAX code as a state dict.

    Args:
        params: the tree `params` of a checkpoint, nested or flattened with "/", with or without the leading
            "params" and "net". Dense kernels are (in, out), the patch embedding's (p, p, C, D).

    Returns:
        A state dict for `DiT.load_state_dict`, float32.

    Raises:
        ValueError: a leaf whose place is not known.
    """
    state = {}
    for path, leaf in _flatten(params):
        names = [name for name in path if name not in ("params", "net", "_flax_linear", "_flax_embedding")]
        kind = names.pop()
        key = re.sub(r"\blayers_(\d+)", r"\1", ".".join(names))
        value = torch.from_numpy(np.array(leaf, dtype=np.float32))
        if kind == "kernel":
            key, value = f"{key}.weight", value.permute(3, 2, 0, 1) if value.ndim == 4 else value.T
        elif kind == "bias":
            key = f"{key}.bias"
        elif kind == "embedding":
            key = f"{key}.weight"
        else:
            raise ValueError(f"unknown parameter {'/'.join(path)}: expected a kernel, bias or embedding")
        state[key] = value.contiguous()
    return state


def _flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    leaves = []
    for name, value in tree.items():
        path = (*prefix, *name.split("/"))
        leaves += _flatten(value, path) if isinstance(value, Mapping) else [(path, value)]
    return leaves


def from_sit(checkpoint: Mapping[str, Any], reverse_time: bool = False) -> Converted:
    """Parameters of a DiT or SiT checkpoint, or of a MeanFlow port built on one.

    A checkpoint without a second time embedder gets one that adds nothing until it is trained: the network is then
    the velocity it was, for every h. The variance channels of a DiT that predicts them are left out.

    Args:
        checkpoint: a state dict, or a mapping that holds one under "ema", "model" or "state_dict".
        reverse_time: the checkpoint has data at t = 1 and predicts data minus noise, as the original SiT does; here
            data is at t = 0. Folded into the weights, exactly: u(z, t) = -v(z, 1 - t).

    Returns:
        The state dict, the parameters left fresh, and the entries not used.

    Raises:
        ValueError: there is no DiT in the checkpoint.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"no DiT in this checkpoint: it is a {type(checkpoint).__name__}, not a state dict")
    for key in ("ema", "model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
            break
    state, unused = {}, []
    for key, value in checkpoint.items():
        name = key.removeprefix("module.").replace("r_embedder.", "h_embedder.")
        if re.match(
            r"(x_embedder\.proj|[th]_embedder\.mlp|y_embedder\.|blocks\.\d+\.(attn|mlp|adaLN)|final_layer)", name
        ):
            state[name] = value.detach().float().clone()
        else:
            unused.append(key)
    if "x_embedder.proj.weight" not in state or "final_layer.linear.weight" not in state:
        raise ValueError("no DiT in this checkpoint: it has no x_embedder.proj.weight or final_layer.linear.weight")

    hidden_size, channels, patch, _ = state["x_embedder.proj.weight"].shape
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if len(state[name]) == 2 * patch * patch * channels:
            per_pixel = state[name].unflatten(0, (patch * patch, 2, channels))  # (p * p, velocity or variance, C, ...)
            state[name] = per_pixel[:, 0].flatten(0, 1).clone()

    fresh = []
    features = state["t_embedder.mlp.0.weight"].shape[1]
    if not any(name.startswith("h_embedder.") for name in state):
        embedder = {
            "h_embedder.mlp.0.weight": 0.02 * torch.randn(hidden_size, features),
            "h_embedder.mlp.0.bias": torch.zeros(hidden_size),
            "h_embedder.mlp.2.weight": torch.zeros(hidden_size, hidden_size),
            "h_embedder.mlp.2.bias": torch.zeros(hidden_size),
        }
        state.update(embedder)
        fresh = list(embedder)

    if reverse_time:
        # cos((1 - t) f) = cos f cos tf + sin f sin tf and sin((1 - t) f) = sin f cos tf - cos f sin tf.
        cos_f, sin_f = sinusoid(torch.ones(1), features)[0].chunk(2)
        weight_cos, weight_sin = state["t_embedder.mlp.0.weight"].chunk(2, dim=1)
        state["t_embedder.mlp.0.weight"] = torch.cat(
            [weight_cos * cos_f + weight_sin * sin_f, weight_cos * sin_f - weight_sin * cos_f], dim=1
        )
        for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
            state[name] = -state[name]
    return Converted(state, fresh, unused)
