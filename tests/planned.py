"""What the planner says of single ranks: it tells stages and replicas itself."""

from megatron_xy.config import RunConfig
from megatron_xy.plan.job import Job, jobs
from megatron_xy.plan.memory import RoleMemory, stage_memory


def rank_memory(config: RunConfig, *, world_size: int, rank: int) -> list[RoleMemory]:
    """What `rank` of a job holds, one entry a role that it has. The config is checked, its shapes complete."""
    return [_of_rank(job, rank) for job in jobs(config, world_size=world_size) if rank in job.ranks]


def _of_rank(job: Job, rank: int) -> RoleMemory:
    place, parallel = job.ranks.index(rank), job.parallel
    return stage_memory(
        job,
        stage=place * parallel.pipeline_model_parallel_size // len(job.ranks),
        replica=place // parallel.tensor_model_parallel_size % job.dp_size,
    )
