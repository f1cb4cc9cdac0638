"""A network of stock modules: no tangents, no zero rows, nothing from mfengine."""

import torch.autograd.forward_ad as fwad

from benchmarks.baselines.port import PortDiT, plain_attention


class StockNetwork(PortDiT):
    """The port's DiT as u(z, t, h, y); records its calls as (rows, whether under a JVP)."""

    def __init__(self, config, attend=plain_attention):
        super().__init__(config)
        self.num_classes = config.num_classes
        self.attend = attend
        self.calls = []

    def forward(self, z, t, h, y):
        assert len(z), "zero rows"
        self.calls.append((len(z), fwad.unpack_dual(z).tangent is not None if fwad._current_level >= 0 else False))
        return super().forward(z, t, h, y, self.attend)
