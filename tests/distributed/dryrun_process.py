"""`python -m tests.distributed.dryrun_process WORLD_SIZE`: what every rank of configs, JSON lines on stdin, would hold.

One JSON document on stdout: [config][rank] of RankFindings.
"""

import json
import sys
from dataclasses import asdict

from megatron_xy import device

device.start_dry()

from megatron_xy.config import RunConfig  # noqa: E402
from megatron_xy.dryrun.training import dry_run  # noqa: E402

world_size = int(sys.argv[1])
findings = []
for line in sys.stdin:
    config = RunConfig.model_validate_json(line)
    width = config.training.micro_batch_tokens
    findings.append(
        [
            asdict(role)
            for rank in range(world_size)
            for role in dry_run(config, rank=rank, world_size=world_size, bucket=width)
        ]
    )
print(json.dumps(findings))
