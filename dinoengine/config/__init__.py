from dinoengine.config.config import CfgNode, ConfigError, key_origins
from dinoengine.config.configurable import configurable
from dinoengine.config.defaults import cfg_from_text, get_cfg, read_cfg
from dinoengine.config.validate import validate

__all__ = [
    "CfgNode",
    "ConfigError",
    "cfg_from_text",
    "configurable",
    "get_cfg",
    "key_origins",
    "read_cfg",
    "validate",
]
