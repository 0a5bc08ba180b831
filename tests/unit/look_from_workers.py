"""What workers find loaded, as a script: `look_from_workers.py alone`, or `with_thread` beside another thread."""

import sys
import threading

from megatron_xy.data.building.workers import Workers

loaded = []


def look(task, advance):
    return list(loaded)


if __name__ == "__main__":
    over = threading.Event()
    if sys.argv[1] == "with_thread":
        threading.Thread(target=over.wait).start()
    with Workers(2, progress=None, prepare=lambda: loaded.append("by the build")) as pool:
        print(list(pool.run("look", look, [1, 2], total=2, unit="tasks")))
    over.set()
