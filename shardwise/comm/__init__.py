"""Communication between ranks. Importing this package does not import torch.

`base.Communicator` is the one protocol; `strategy.create` picks a transport for it and records why.

    rank, names                 rank identity and groups; names of strategies
    base, member, collective,   the protocol; what all transports share: a rank's place in a group and the record of
    arguments, compose,         its calls, the collectives with their checks, sums in rank order, control messages
    accumulate, control
    shm, chunks, segment,       transport `shm`: collectives in shared memory of one host, rounds in it, how it is made,
    sharing, direct             reading a peer's own memory
    torch_dist, torch_group,    `gloo` and `nccl`, how their groups are made and ranks wait; torch's symmetric memory;
    torch_wait, symmetric,      NCCL's registered windows
    window
    mpi, mpi_library, mpi_wait, `mpi`, the library beneath, how its ranks meet, wait for each other, with a deadline,
    arrival, leaving            and end
    threads, fake               ranks as threads; one process that plays one rank
    p2p/                        `p2p` and `flashinfer`: all-reduce through the memory of the peers' GPUs
    bootstrap, strategy         rendezvous; the choice of a transport
    watch                       deadlines, phases, flight record
    bench, bench_cases,         timing loops of `shardwise bench comm`, what they call
    bench_peers
"""
