"""A run's config: from a YAML file and overrides to a `RunConfig`, with defaults, units and checks.

Nothing here imports torch: `check` and `--help` answer in under a second. What other files take from here stands below;
start with `sections`, which has every key.
"""

from megatron_xy.config.data_rules import check_buckets
from megatron_xy.config.loading import dump_config, load_config, load_model_options, run_dir_of
from megatron_xy.config.model_rules import (
    check_role_shapes,
    check_shape,
    data_parallel_size,
    layout_rules,
    shape_rules,
)
from megatron_xy.config.problems import InvalidConfig, Problem
from megatron_xy.config.roles import (
    TRAINED_ROLES,
    PlacedRole,
    filling_answer,
    placed_roles,
    role_names,
    role_sections,
    room_for_answers,
)
from megatron_xy.config.rules import check_world
from megatron_xy.config.sections import (
    MIN_TEMPERATURE,
    DataConfig,
    Head,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Phase,
    PPOConfig,
    RewardConfig,
    RoleConfig,
    RoleName,
    RunConfig,
    RuntimeConfig,
    TrainingConfig,
)

__all__ = [
    "MIN_TEMPERATURE",
    "TRAINED_ROLES",
    "DataConfig",
    "Head",
    "InvalidConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PPOConfig",
    "ParallelConfig",
    "Phase",
    "PlacedRole",
    "Problem",
    "RewardConfig",
    "RoleConfig",
    "RoleName",
    "RunConfig",
    "RuntimeConfig",
    "TrainingConfig",
    "check_buckets",
    "check_role_shapes",
    "check_shape",
    "check_world",
    "data_parallel_size",
    "dump_config",
    "filling_answer",
    "layout_rules",
    "load_config",
    "load_model_options",
    "placed_roles",
    "role_names",
    "role_sections",
    "room_for_answers",
    "run_dir_of",
    "shape_rules",
]
