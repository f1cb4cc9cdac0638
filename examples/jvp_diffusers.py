"""The derivative of a diffusers transformer along a direction, which MeanFlow and consistency models train on.

python examples/jvp_diffusers.py   # writes jvp_diffusers.png; needs mfengine[vae,bench]

PyTorch does not differentiate the attention of this model in forward mode. Inside `mfengine.jvp_attention()` it does.
The picture compares the derivative with finite differences, which are never this accurate in float32.
"""

import matplotlib.pyplot as plt
import torch
from diffusers import DiTTransformer2DModel
from torch.func import jvp

import mfengine

torch.manual_seed(0)
model = DiTTransformer2DModel(
    num_attention_heads=4, attention_head_dim=16, num_layers=4, in_channels=4, sample_size=16, num_embeds_ada_norm=10
).eval()  # random weights; training mode would drop labels at random
z, v, t, y = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.rand(2), torch.tensor([3, 7])


def u(z, t):
    """The model's prediction for latents z (B, C, H, W) at times t (B,)."""
    return model(z, timestep=1000 * t, class_labels=y).sample


def distance(actual):
    return ((actual - exact).norm() / exact.norm()).item()


with mfengine.jvp_attention():
    prediction, du_dt = jvp(u, (z, t), (v, torch.ones_like(t)))

print(mfengine.accelerate(model))  # works without the context: replaces attention and adaLN in place
accelerated = jvp(u, (z, t), (v, torch.ones_like(t)))[1]

model.double()
z, v, t = z.double(), v.double(), t.double()
exact = jvp(u, (z, t), (v, torch.ones_like(t)))[1]
model.float()
z, v, t = z.float(), v.float(), t.float()
sizes = [10 ** (-k / 4) for k in range(4, 25)]
with torch.no_grad():
    differences = [(u(z + e * v, t + e) - u(z - e * v, t - e)) / (2 * e) for e in sizes]
errors = [distance(d) for d in differences]
print(f"JVP: {distance(du_dt):.1e}, accelerated: {distance(accelerated):.1e}, finite differences: {min(errors):.1e}")

plt.figure(figsize=(6, 3.5), layout="constrained")
plt.loglog(sizes, errors, "o-", label="central difference")
plt.axhline(distance(du_dt), color="black", linestyle="--", label="torch.func.jvp inside jvp_attention()")
plt.xlabel("step of the difference")
plt.ylabel("relative error of du/dt, float32")
plt.legend()
plt.savefig("jvp_diffusers.png", dpi=100)
