"""`megatron-xy convert` as a script: a checkpoint or HF folder -> either of them, with the same options and codes."""

import sys

from megatron_xy.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
