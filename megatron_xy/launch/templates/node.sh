# One node's share: torchrun and its ranks. USR1 or TERM goes to the ranks themselves, which save and leave with 75; through
# torchrun a save would have 30 s. torchrun ignores USR1, which a scheduler may send to every process. Ranks meet at the first
# node's --local-addr, a name that all resolve; left out, it would be what the node calls itself, which may be localhost.
train_node() {
    local node_name={{ node_name }} status=1
    mkdir -p {{ (job.log_dir / "torchrun") | quoted }}
    (
        trap '' USR1
        exec {{ launcher }} \
            --nnodes={{ job.nodes }} --nproc-per-node={{ job.gpus_per_node }} \
            --rdzv-backend=c10d --rdzv-id="$rendezvous_id" --rdzv-endpoint="$head_node:{{ job.port }}" --local-addr="$node_name" \
            --log-dir={{ (job.log_dir / "torchrun") | quoted }} --tee=3 \
            {{ worker }}
    ) &
    torchrun=$!
    trap 'kill -USR1 $(cat /proc/"$torchrun"/task/*/children)' USR1 TERM
    while kill -0 "$torchrun" 2> /dev/null; do
        wait "$torchrun"  # ends early when a signal comes
        status=$?
    done
    return "$status"
}

# Before a start: what ended an earlier one is forgotten. Not where another run is at work in the folder: what lies there is
# that one's, and ours would be refused. The kernel's locks tell, as they do the ranks; those of a lost node outlive it on a
# file server until their lease has run out (NFS: 90 s).
forget_exit() {
    local held
    for held in {{ (job.run_dir / ".lock") | quoted }} {{ (job.run_dir / ".supervisor.lock") | quoted }}; do
        [ -e "$held" ] || continue
        flock --shared --wait 120 --conflict-exit-code 78 "$held" true
        if [ $? -eq 78 ]; then
            echo "another run is active in {{ job.run_dir }}; wait for it, stop it, or choose another run_dir"
            exit 78
        fi
    done
    rm -f {{ (job.run_dir / "exit.json") | quoted }}
}

# What ended the run, by RUN/exit.json: torchrun itself says 0 or 1 only.
exit_code() {
    sed -n 's/^ *"code": *\([0-9]*\),*$/\1/p' {{ (job.run_dir / "exit.json") | quoted }} 2> /dev/null
}
