"""MeanFlow in 40 lines: digits drawn from noise in one evaluation of the network.

python examples/meanflow.py [STEPS]   # writes meanflow.png; needs mfengine[digits]
"""

import sys

import torch
from PIL import Image
from sklearn.datasets import load_digits

from mfengine import DiT, MeanFlow, MeanFlowConfig, ModelConfig, sample
from mfengine.optim import AdamWEMA

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 1500
generator = torch.manual_seed(0)
data = load_digits()  # 1,797 images of 8 x 8 pixels from 0 to 16
images = (torch.tensor(data.images, dtype=torch.float32)[:, None] - 5) / 6  # mean 0, variance 1
labels = torch.tensor(data.target)

model = DiT(ModelConfig(8, patch_size=4, in_channels=1, hidden_size=128, depth=4, num_heads=4, num_classes=10))
method = MeanFlow(MeanFlowConfig())
optimizer = AdamWEMA(model.parameters(), lr=2e-3, ema_decays=(0.995,))

for step in range(1, steps + 1):
    rows = torch.randint(len(images), (128,), generator=generator)
    draws = method.draw(images[rows].shape, generator)
    loss, metrics = method.loss(model, images[rows], labels[rows], draws)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 100 == 0:
        print(f"step {step}: squared error of the velocity {metrics['v_loss'].mean():.1f}")

with optimizer.averaged(model):
    digits = sample(model, torch.randn(100, 1, 8, 8), torch.arange(10).repeat_interleave(10))
pixels = torch.nn.functional.pad((6 * digits + 5) * 255 / 16, (1, 1, 1, 1)).clamp(0, 255).byte()
grid = pixels.view(10, 10, 10, 10).transpose(1, 2).reshape(100, 100)  # one row per digit
Image.fromarray(grid.numpy()).resize((500, 500), 0).save("meanflow.png")
