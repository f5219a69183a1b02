from dinoengine.config.config import CfgNode, ConfigError, key_origins
from dinoengine.config.configurable import configurable
from dinoengine.config.defaults import get_cfg
from dinoengine.config.validate import validate

__all__ = ["CfgNode", "ConfigError", "configurable", "get_cfg", "key_origins", "validate"]
