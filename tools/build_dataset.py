"""`megatron-xy data build` as a script: corpus -> token shards -> packed buckets, with the same options and codes."""

import sys

from megatron_xy.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["data", "build"]
    main()
