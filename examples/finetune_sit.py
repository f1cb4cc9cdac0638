"""A SiT checkpoint needs many steps to draw a sample. After fine-tuning with MeanFlow, it needs one.

python -m mfengine.prepare digits data/digits    # once; needs mfengine[digits]
python examples/finetune_sit.py                  # writes finetune_sit.png
    python examples/finetune_sit.py SiT.pt DATA      # your own SiT, and a data set from mfengine.prepare

Without a checkpoint, the script first trains a tiny stand-in on the digits. To run on many GPUs, with checkpoints and
averaged weights, use `python -m mfengine.train xl2 --init SiT.pt --init-reverse-time`.
"""

from pathlib import Path

import torch

from mfengine import DiT, MeanFlow, MeanFlowConfig, ModelConfig, cli, sample
from mfengine.convert import from_sit
from mfengine.data.format import Dataset
from mfengine.data.loader import Loader
from mfengine.data.pictures import draw_latents, labelled_grid, write_picture
from mfengine.errors import InputError

STEPS, BATCH = 1000, 128
HEADS = {64: 4, 384: 6, 768: 12}  # attention heads by width; wider models have 16


def train(model, config, loader):
    method, optimizer = MeanFlow(config), torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(1, STEPS + 1):
        latents, labels = loader.draw(torch.default_generator)
        draws = method.draw(latents.shape, torch.default_generator)
        loss, metrics = method.loss(model, latents, labels, draws)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"step {step}: squared error of the velocity {metrics['v_loss'].mean():.1f}")


def stand_in(loader):
    """The checkpoint of a tiny SiT: one time embedder, data at t = 1."""
    model = DiT(ModelConfig(8, 4, 1, hidden_size=64, depth=4, num_heads=4, num_classes=10))
    model.h_embedder.requires_grad_(False).mlp[2].weight.zero_()
    train(model, MeanFlowConfig(interval_share=0), loader)  # plain flow matching
    state = from_sit(model.state_dict(), reverse_time=True).state_dict  # converts our time to SiT's
    return {name: p for name, p in state.items() if not name.startswith("h_embedder")}


def main(args):
    if len(args) not in (0, 2):
        raise InputError(f"give a checkpoint and a data set, or no argument at all, not {len(args)} argument(s)")
    torch.manual_seed(0)
    path, data = args or (None, "data/digits")
    dataset = Dataset.open(Path(data))
    loader = Loader(dataset, BATCH, part=0, num_parts=1, seed=0, device=torch.device("cpu"))
    if path is None:
        print("no checkpoint given: training a tiny stand-in for one")
    checkpoint = stand_in(loader) if path is None else torch.load(path, map_location="cpu", weights_only=True)

    state = from_sit(checkpoint, reverse_time=True).state_dict  # u(z, t, h, y) = -v(z, 1 - t, y) for every h
    width, channels, patch, _ = state["x_embedder.proj.weight"].shape
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    classes = len(state["y_embedder.embedding_table.weight"]) - 1
    model = DiT(ModelConfig(dataset.space.shape[1], patch, channels, width, depth, HEADS.get(width, 16), classes))
    model.load_state_dict(state)

    noise, labels = torch.randn(10, *dataset.space.shape), torch.arange(10)
    rows = {f"SiT, {steps} step(s)": sample(model, noise, labels, steps) for steps in (1, 4, 64)}
    train(model, MeanFlowConfig(), loader)
    rows["fine-tuned, 1 step"] = sample(model, noise, labels)
    blocks = {name: draw_latents(latents, dataset.space) for name, latents in rows.items()}
    write_picture(labelled_grid(blocks, [str(label) for label in range(10)]), Path("finetune_sit.png"))


if __name__ == "__main__":
    cli.run(main)
