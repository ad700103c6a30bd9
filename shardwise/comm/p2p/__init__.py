"""All-reduce and small gathers between GPUs of one host: plain CUDA IPC, kernels in stock Triton.

    memory.py        16-byte chunks: read, written, pushed, awaited
    bulk.py          pushes through shared memory by bulk copies
    arithmetic.py    roundings and sums in instructions of their own
    asm.py           what their PTX shares; each piece has a twin for the interpreter (the wait's: interpreted.py)
    rows.py          what the kernels do with a row
    one_shot.py      every rank gets all contributions; plain, and fused with residual add and RMSNorm
    two_shot.py      each rank sums a part and pushes the sums; the same operations
    gather.py        one-shot all-gather of any type, along any dimension
    fp8.py           one-shot that sends e4m3 with scales
    cuda.py          the few CUDA runtime calls that PyTorch lacks: plain device memory and its IPC handles
    workspace.py     the buffers, their exchange, what says that a wait gave up
    spread.py        how a tensor falls on rows
    launch.py        from tensors to launches
    plans.py         calls of one layout, worked out once
    table.py         which strategy and launch for which size, with the measurement that set it
    streams.py       the order of calls on several streams
    delegate.py      a group that runs some calls on own kernels, all else on another group of the same ranks; a group
                     without kernels whose sub-groups may have them
    communicator.py  the Communicator on top
    flashinfer.py    the same Communicator over FlashInfer's TRT-LLM kernels
    protocol.py      what the kernels do to memory in a call, block by block
    machine.py       ranks, their memory and the stores under way, moved one operation at a time
    model.py         the protocol without a GPU, in every order and under faults

NVLink multicast is never used.
"""
