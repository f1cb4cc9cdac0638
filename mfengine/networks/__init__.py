"""Networks by name. To add one from outside: `NETWORKS["mine"] = Mine`."""

from mfengine.configs import Registry
from mfengine.networks.base import Network, NetworkConfig, ShardUnit
from mfengine.networks.dit import DiT, ModelConfig
from mfengine.networks.imf_dit import IMFDiT, IMFDiTConfig

NETWORKS: Registry[Network] = Registry("network", dit=DiT, **{"imf-dit": IMFDiT})

__all__ = ["NETWORKS", "DiT", "IMFDiT", "IMFDiTConfig", "ModelConfig", "Network", "NetworkConfig", "ShardUnit"]
