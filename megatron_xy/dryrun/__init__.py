"""One rank of a job of any size in one process: what it would hold and send, counted from what was built."""
