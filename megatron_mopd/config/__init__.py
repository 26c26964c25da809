"""Typed configuration: dataclasses, YAML files and ``a.b=c`` overrides.

``load_config(path, overrides)`` is the only way to configure a run. The objects are frozen.
"""

from megatron_mopd.config.errors import ConfigError, closest, nearest
from megatron_mopd.config.loading import (
    config_from_dict,
    load_config,
    model_config_from_dict,
    save_config,
    to_dict,
)
from megatron_mopd.config.objectives import DomainObjectives
from megatron_mopd.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    PromptSource,
    RewardsConfig,
    RolloutConfig,
    ScheduleConfig,
    TeacherConfig,
    TeacherStorageConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "DomainObjectives",
    "LogConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PromptSource",
    "RewardsConfig",
    "RolloutConfig",
    "ScheduleConfig",
    "TeacherConfig",
    "TeacherStorageConfig",
    "closest",
    "config_from_dict",
    "load_config",
    "model_config_from_dict",
    "nearest",
    "save_config",
    "to_dict",
]
