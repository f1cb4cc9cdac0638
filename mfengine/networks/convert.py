"""Converts parameters of other code bases to a state dict of `mfengine.DiT` or `mfengine.IMFDiT`, and back."""

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
        ValueError: a leaf is unknown.
    """
    return _from_flax(params)


def from_jax_imf(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Parameters of the improved MeanFlow authors' JAX code as a state dict.

    Args:
        params: as in `from_jax`. Moving averages in the checkpoint form a tree like that of the weights.

    Returns:
        A state dict for `IMFDiT.load_state_dict`, float32.

    Raises:
        ValueError: a leaf is unknown.
    """
    return _from_flax(params)


def _from_flax(params: Mapping[str, Any]) -> dict[str, Tensor]:
    state = {}
    for path, leaf in _flatten(params):
        names = [name for name in path if name not in ("params", "net", "_flax_linear", "_flax_embedding")]
        kind = names.pop()
        key = re.sub(r"\b(?:layers_|(shared_blocks|u_heads|v_heads)_)(\d+)", _numbered, ".".join(names))
        value = torch.from_numpy(np.array(leaf, dtype=np.float32))
        if kind == "kernel":  # norms have one, too
            key, value = f"{key}.weight", value.permute(3, 2, 0, 1) if value.ndim == 4 else value.t()
        elif kind == "bias":
            key = f"{key}.bias"
        elif kind == "embedding":
            key = f"{key}.weight"
        elif kind.endswith(("_scale", "_tokens")):
            key = f"{key}.{kind}" if key else kind
        else:
            raise ValueError(f"unknown parameter {'/'.join(path)}: expected a kernel, bias, embedding, scale or tokens")
        state[key] = value.contiguous()
    return state


def _numbered(match: re.Match[str]) -> str:
    return f"{match[1]}.{match[2]}" if match[1] else match[2]


def _flatten(tree: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    leaves = []
    for name, value in tree.items():
        path = (*prefix, *name.split("/"))
        leaves += _flatten(value, path) if isinstance(value, Mapping) else [(path, value)]
    return leaves


def from_sit(checkpoint: Mapping[str, Any], reverse_time: bool = False) -> Converted:
    """Parameters of a DiT or SiT checkpoint, or of a MeanFlow port built on one.

    If the checkpoint has no second time embedder, the network gets one that adds nothing until it is trained: until
    then it is the same velocity for every h. The variance channels of a DiT that predicts variances are dropped.

    Args:
        checkpoint: a state dict, or a mapping that holds one under "ema", "model" or "state_dict".
        reverse_time: the checkpoint has data at t = 1 and predicts data minus noise, like the original SiT; here data
            is at t = 0. The weights absorb the difference exactly: u(z, t) = -v(z, 1 - t).

    Returns:
        The state dict, the parameters that stay fresh, and the unused entries.

    Raises:
        ValueError: there is no DiT in the checkpoint.
    """
    checkpoint = _state_dict(checkpoint, "DiT")
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


def from_imf(checkpoint: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """Parameters of the improved MeanFlow authors' PyTorch code (.pth), which may lack the blocks of the v-head.

    Args:
        checkpoint: a state dict, or a mapping that holds one under "ema", "model" or "state_dict".

    Returns:
        A state dict for `IMFDiT`, float32, without what the checkpoint lacks; and the unused entries.

    Raises:
        ValueError: the checkpoint holds no such network.
    """
    state, unused = {}, []
    for key, value in _state_dict(checkpoint, "improved MeanFlow").items():
        name = re.sub(r"^(module\.)?(net\.)?|(?<=\.)_flax_(linear|embedding)\.", "", key)
        if re.match(r"(x_embedder\.proj|\w+_(embedder|heads|blocks|tokens|final_layer)\b)", name):
            state[name] = value.detach().float().clone()
        else:
            unused.append(key)
    if "u_final_layer.linear.weight" not in state or "time_tokens" not in state:
        raise ValueError(
            "no improved MeanFlow in this checkpoint: it has no u_final_layer.linear.weight or time_tokens"
        )
    return state, unused


def to_imf(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of `IMFDiT` as the authors' PyTorch code loads it for inference: without the blocks of the v-head.

    Args:
        state: a state dict with or without the v-head.

    Returns:
        A mapping for `torch.save` to a .pth. The authors' code has an output layer of v but does not use it; if the
        state has none, it is that of u.
    """
    outputs = {name.replace("u_", "v_", 1): value for name, value in state.items() if name.startswith("u_final_layer.")}
    state = {**outputs, **{name: value for name, value in state.items() if not name.startswith("v_heads.")}}
    pattern = re.compile(r"(_proj|\.w[123]|mlp\.\d|final_layer\.linear|(embedding_table))\.(?=weight|bias)")

    def named(match: re.Match[str]) -> str:
        return f"{match[1]}._flax_{'embedding' if match[2] else 'linear'}."

    return {"net." + pattern.sub(named, name): value for name, value in state.items()}


def _state_dict(checkpoint: Any, what: str) -> Mapping[str, Any]:
    """The state dict in a checkpoint; ValueError if there is none. `what` names the network."""
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"no {what} in this checkpoint: it is a {type(checkpoint).__name__}, not a state dict")
    for key in ("ema", "model", "state_dict"):
        if isinstance(checkpoint.get(key), Mapping):
            return checkpoint[key]
    return checkpoint
