"""Networks by name. Another one is put in from outside: `NETWORKS["mine"] = Mine`."""

from mfengine.configs import Registry
from mfengine.networks.base import Network, NetworkConfig, ShardUnit
from mfengine.networks.dit import DiT, ModelConfig

NETWORKS: Registry[Network] = Registry("network", dit=DiT)

__all__ = ["NETWORKS", "DiT", "ModelConfig", "Network", "NetworkConfig", "ShardUnit"]
